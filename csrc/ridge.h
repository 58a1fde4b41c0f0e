// The repair policy of spd_solve in one place, free of torch headers so that device code can include it.
#pragma once

#if defined(__CUDACC__)
#define PSILORA_HOST_DEVICE __host__ __device__ inline
#else
#define PSILORA_HOST_DEVICE inline
#endif

namespace psilora {

// Attempt 0 takes the matrix as it is, attempts 1 to 3 add a growing ridge; info == kAttempts means: gave up.
constexpr int kAttempts = 4;

// ridge_j = 8·r·eps·1024^(j−1)·max_i |gram_ii|; the factor before `largest` is exact in either dtype.
template <typename T>
PSILORA_HOST_DEVICE T ridge(int attempt, int rank, T largest) {
  if (attempt == 0) return T(0);
  T unit = T(8 * rank) * (sizeof(T) == 4 ? T(1.1920928955078125e-07) : T(2.220446049250313080847e-16));
  for (int j = 1; j < attempt; ++j) unit *= T(1024);
  return unit * largest;
}

// Running maximum of |value| in which a NaN, once seen, stays.
template <typename T>
PSILORA_HOST_DEVICE T largest_magnitude(T largest, T value) {
  const T magnitude = value < T(0) ? -value : value;
  return (magnitude > largest || magnitude != magnitude) ? magnitude : largest;
}

// True for finite numbers above zero; false for NaN and infinity.
template <typename T>
PSILORA_HOST_DEVICE bool positive_finite(T value) {
  return value > T(0) && value - value == T(0);
}

}  // namespace psilora
