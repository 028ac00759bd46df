#include "generator.h"

#include "cpu.h"
#include "torch_abi.h"

namespace bicm {
namespace {

using State = abi::GeneratorState;

struct Asked {
  Object tensor;
  State* state = nullptr;
};

// Of torch, looked up once.
struct Found {
  PyObject *type, *usual;
  PyCFunction get_state, set_state;
};
Found found_ = {};

PyCFunction method_of(PyObject* object, const char* name, int flags) {
  PyObject* method = PyObject_GetAttrString(object, name);
  const bool plain = method != nullptr && PyCFunction_Check(method) && PyCFunction_GetFlags(method) == flags;
  const PyCFunction address = plain ? PyCFunction_GetFunction(method) : nullptr;
  Py_XDECREF(method);
  return address;
}

bool none_left(const State& state) { return state.left == 1 && (state.next == 0 || state.next == kMersenneWords); }

bool is_known(const State& state) {
  const bool somewhere = state.next < kMersenneWords && state.left == kMersenneWords + 1 - static_cast<int>(state.next);
  return state.seeded == 1 && (none_left(state) || somewhere);
}

// Advances the words of a state and fills `out`; false, with nothing changed, for a state of another layout.
bool advance(State& state, float* out, int64_t count) {
  if (!is_known(state)) return false;
  Mersenne words;
  for (int i = 0; i < kMersenneWords; ++i) words.words[i] = static_cast<uint32_t>(state.words[i]);
  words.next = none_left(state) ? kMersenneWords : static_cast<int32_t>(state.next);
  if (!active_kernels().generator_normals(words, out, count)) return false;
  for (int i = 0; i < kMersenneWords; ++i) state.words[i] = words.words[i];
  state.next = static_cast<uint64_t>(words.next);
  state.left = kMersenneWords + 1 - words.next;
  return true;
}

Asked state_of(PyObject* generator) {
  Object tensor(found_.get_state(generator, nullptr));
  int64_t bytes = 0;
  void* const data = tensor.get() == nullptr ? nullptr : bytes_of(tensor.get(), bytes);
  STD_TORCH_CHECK(data != nullptr && bytes == sizeof(State), "bicm_kernels: a generator of another kind");
  return {std::move(tensor), static_cast<State*>(data)};
}

// Draws through here are serialised: each holds the interpreter lock from reading the state until it is set.
// Torch's own draws are not: if one of them changed the state in the meantime, these numbers are drawn again.
void draw(PyObject* generator, float* out, int64_t count) {
  Asked asked, now = state_of(generator);  // both live until the end: freeing a tensor releases the interpreter lock
  std::pair<uint64_t, uint64_t> before;
  do {
    asked = std::move(now);
    before = asked.state->place();
    STD_TORCH_CHECK(advance(*asked.state, out, count), "bicm_kernels: a state of another kind");
    now = state_of(generator);
  } while (now.state->place() != before);
  const Object done(found_.set_state(generator, asked.tensor.get()));
  STD_TORCH_CHECK(done.get() != nullptr, "bicm_kernels: the generator does not take its state back");
}

bool is_generator(PyObject* object) { return reinterpret_cast<PyObject*>(Py_TYPE(object)) == found_.type; }

}  // namespace

// Whether states have the expected layout, checked on a generator with a known seed.
static bool knows_states() {
  constexpr int kSeed = 20240817;
  const Object fresh(PyObject_CallNoArgs(reinterpret_cast<PyObject*>(found_.type)));
  const Object seeded(fresh.get() == nullptr ? nullptr : PyObject_CallMethod(fresh.get(), "manual_seed", "i", kSeed));
  if (seeded.get() == nullptr) return false;
  const Object state(found_.get_state(fresh.get(), nullptr));
  int64_t bytes = 0;
  void* const data = state.get() == nullptr ? nullptr : bytes_of(state.get(), bytes);
  return data != nullptr && bytes == sizeof(State) && abi::is_freshly_seeded(*static_cast<const State*>(data), kSeed);
}

void open_generator() {
  PyObject* torch = PyImport_ImportModule("torch");
  PyObject* usual = torch == nullptr ? nullptr : PyObject_GetAttrString(torch, "default_generator");
  if (usual != nullptr) {
    found_ = {reinterpret_cast<PyObject*>(Py_TYPE(usual)), usual, method_of(usual, "get_state", METH_NOARGS),
              method_of(usual, "set_state", METH_O)};
  }
  if (found_.get_state != nullptr && !knows_states()) found_.get_state = nullptr;
  Py_XDECREF(torch);
  PyErr_Clear();
}

bool read(PyObject* from, Generators& to) {
  if (found_.get_state == nullptr || found_.set_state == nullptr) return false;
  if (!PyList_Check(from) && !PyTuple_Check(from)) return is_generator(to.one = from == Py_None ? found_.usual : from);
  to.each = Object(PySequence_Tuple(from));
  if (to.each.get() == nullptr) return PyErr_Clear(), false;
  for (int64_t i = 0; i < to.count(); ++i) {
    if (!is_generator(to[i])) return false;
  }
  return true;
}

Object generator_normal(Few<int64_t, kMostDims> shape, Generators generators) {
  const int64_t drawers = generators.count(), count = count_of(shape);
  STD_TORCH_CHECK(generators.one != nullptr || (shape.size() > 0 && shape[0] == drawers),
                  "bicm_kernels: a generator for each sample");
  STD_TORCH_CHECK(count >= 16 * drawers, "bicm_kernels: torch draws few numbers in another way");
  for (int64_t i = 0; drawers > 1 && i < drawers; ++i) {
    STD_TORCH_CHECK(is_known(*state_of(generators[i]).state), "bicm_kernels: a state of another kind");
  }
  Object result = empty_on_host(shape, DType::float32);
  float* const data = static_cast<float*>(result.view.data);
  for (int64_t i = 0; i < drawers; ++i) draw(generators[i], data + i * (count / drawers), count / drawers);
  return result;
}

}  // namespace bicm
