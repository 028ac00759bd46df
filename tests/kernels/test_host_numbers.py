"""A 0-d number on the CPU beside tensors on a GPU, without a GPU: what the binding makes of it, compiled by itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)

# The tensors lie on GPU 0. What lies there too must not be looked at: it is given an address that nobody may read.
PROGRAM = """
#include <cmath>
#include <cstdio>

#include "torch/numbers.h"

using namespace bicm;

constexpr int32_t kGpu = 1 * 256 + 0 + 1;

template <class T>
View host(const T& value, DType dtype) {
  return {const_cast<T*>(&value), nullptr, nullptr, 0, dtype, kHost};
}

void show(const char* name, const Number& number) {
  std::printf("%s %a %d\\n", name, number.value, number.data == nullptr);
}

int main() {
  const uint16_t half = 0x3555, brain = 0xbf9d;
  const float single = 0.1f;
  const double wide = 0.1;
  const int64_t seed = -7, one = 1;
  show("float16", number_of(host(half, DType::float16), 3, kGpu));
  show("bfloat16", number_of(host(brain, DType::bfloat16), 3, kGpu));
  show("float32", number_of(host(single, DType::float32), 3, kGpu));
  show("float64", number_of(host(wide, DType::float64), 3, kGpu));
  const Integer integer = integer_of(host(seed, DType::int64), 3, kGpu);
  std::printf("int64 %lld %d\\n", static_cast<long long>(integer.value), integer.data == nullptr);
  void* const nowhere = reinterpret_cast<void*>(16);
  const Number there = number_of(View{nowhere, nullptr, nullptr, 0, DType::float32, kGpu}, 3, kGpu);
  std::printf("there %d\\n", there.data == nowhere);
  const int64_t size = 3;
  for (const View& wrong : {View{nowhere, &size, &one, 1, DType::float32, kHost},
                            View{nowhere, nullptr, nullptr, 0, DType::float32, kGpu + 1}}) {
    try {
      number_of(wrong, 3, kGpu);
      std::puts("taken");
    } catch (const std::runtime_error& error) {
      std::puts("refused");
    }
  }
}
"""


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_numbers_of_every_dtype_are_read_on_the_host(tmp_path: Path) -> None:
    torch_directory = Path(torch.__file__).parent
    source, program = tmp_path / "numbers.cpp", tmp_path / "numbers"
    source.write_text(PROGRAM)
    command = [str(COMPILER), "-std=c++17", "-w", f"-I{CSRC}", "-isystem", str(torch_directory / "include")]
    command += ["-DTORCH_TARGET_VERSION=0x020A000000000000ULL", str(source), "-o", str(program)]
    command += [f"-L{torch_directory / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_directory / 'lib'}"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    *lines, there, on_the_host, elsewhere = ran.stdout.splitlines()
    expected = {
        "float16": torch.tensor(0x3555, dtype=torch.int16).view(torch.float16).item(),
        "bfloat16": torch.tensor(0xBF9D - 2**16, dtype=torch.int16).view(torch.bfloat16).item(),
        "float32": torch.tensor(0.1).item(),
        "float64": 0.1,
    }
    values = {name: (float.fromhex(value), by_value) for name, value, by_value in map(str.split, lines[:4])}
    assert values == {name: (value, "1") for name, value in expected.items()}
    assert lines[4] == "int64 -7 1"
    assert there == "there 1"
    assert (on_the_host, elsewhere) == ("refused", "refused")
