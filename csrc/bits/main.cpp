// bicm_bits: digests of what an instruction set's CPU kernels write, to be compared with those of another processor.
//
//     bicm_bits                  the instruction sets of this processor
//     bicm_bits SET              a line per case: its name, how many elements it wrote, their digest, in words what it is
//     bicm_bits SET CASE         the bits of its elements, one a line
#include <inttypes.h>
#include <stdio.h>

#include "case.h"

namespace bicm {
namespace bits {
namespace {

// FNV-1a, a word at a time.
uint64_t digest(const std::vector<uint64_t>& words) {
  uint64_t hash = 0xCBF29CE484222325;
  for (const uint64_t word : words) {
    hash = (hash ^ word) * 0x100000001B3;
    hash ^= hash >> 32;
  }
  return hash;
}

int list_sets() {
#define BICM_NAME(isa) #isa,
  for (const char* name : {BICM_EACH_ISA(BICM_NAME)}) {
    if (find_kernels(name) != nullptr) puts(name);
  }
  return 0;
}

int run(const Kernels& kernels, const std::string& only) {
  uint64_t seed = 0;
  for (const Family& family : families()) {
    for (int64_t i = 0; i < family.cases; ++i) {
      const std::string name = std::string(family.name) + "/" + std::to_string(i);
      Case c(++seed << 32);
      if (!only.empty() && name != only) continue;
      family.run(c, kernels);
      const std::vector<uint64_t> words = c.written();
      if (only.empty()) {
        printf("%s %zu %016" PRIx64 " %s\n", name.c_str(), words.size(), digest(words), c.about.c_str());
      } else {
        for (const uint64_t word : words) printf("%016" PRIx64 "\n", word);
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace bits
}  // namespace bicm

int main(int count, char** arguments) {
  if (count < 2) return bicm::bits::list_sets();
  const bicm::Kernels* const kernels = bicm::find_kernels(arguments[1]);
  if (kernels == nullptr) {
    fprintf(stderr, "this processor has no instruction set %s\n", arguments[1]);
    return 1;
  }
  return bicm::bits::run(*kernels, count > 2 ? arguments[2] : "");
}
