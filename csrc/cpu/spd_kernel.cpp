// Builds the CPU kernels once per instruction set and picks one at run time: one binary for every machine.
#include "spd_kernel.h"

#include <cmath>

#include "../ridge.h"

namespace psilora::cpu {

namespace baseline {
#define PSILORA_VECTOR_BYTES 16
#include "spd_kernel.inc"
#undef PSILORA_VECTOR_BYTES
}  // namespace baseline

// Function-level targets by pragma are GCC's; other compilers run the 16-byte build.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PSILORA_WIDE 1

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define PSILORA_VECTOR_BYTES 32
#include "spd_kernel.inc"
#undef PSILORA_VECTOR_BYTES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#define PSILORA_VECTOR_BYTES 64
#include "spd_kernel.inc"
#undef PSILORA_VECTOR_BYTES
}  // namespace avx512
#pragma GCC pop_options
#endif

template <typename T>
const SpdKernel<T>& spd_kernel() {
#ifdef PSILORA_WIDE
  if (__builtin_cpu_supports("avx512f")) return avx512::table<T>();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::table<T>();
#endif
  return baseline::table<T>();
}

template const SpdKernel<float>& spd_kernel<float>();
template const SpdKernel<double>& spd_kernel<double>();

}  // namespace psilora::cpu
