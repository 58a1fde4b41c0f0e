// Just enough CUDA for a plain C++ compiler to run device code on the CPU: one std::thread per CUDA thread, a
// barrier for __syncthreads, blocks one after another. For tests on machines without a GPU; built with
// -fsanitize=thread it also reports shared-memory races. It says nothing about speed or code generation.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstddef>
#include <memory>
#include <thread>
#include <vector>

struct Index {
  unsigned x = 1, y = 1;
};

namespace emulation {

struct Block {
  explicit Block(unsigned threads) : barrier(threads) {}
  std::barrier<> barrier;
  std::atomic<int> votes[2] = {0, 0};
};

inline std::unique_ptr<Block> block;
inline unsigned char* shared_memory = nullptr;
inline thread_local unsigned vote_round = 0;

}  // namespace emulation

inline thread_local Index threadIdx, blockIdx;
inline Index blockDim;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define PSILORA_SHARED_MEMORY(name) unsigned char* name = emulation::shared_memory

inline void __syncthreads() { emulation::block->barrier.arrive_and_wait(); }

// Two counters in turn: a fast thread may vote again while slow ones have yet to leave this vote.
inline int __syncthreads_or(int predicate) {
  std::atomic<int>& votes = emulation::block->votes[emulation::vote_round % 2];
  std::atomic<int>& next = emulation::block->votes[++emulation::vote_round % 2];
  if (predicate) votes = 1;
  __syncthreads();
  const int result = votes;
  if (threadIdx.x == 0) next = 0;
  __syncthreads();
  return result;
}

inline float __frsqrt_rn(float value) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(value)));
}
inline double rsqrt(double value) { return 1.0 / std::sqrt(value); }

namespace emulation {

// Runs body() for every thread of every block. Shared memory starts as NaNs: a read before a write shows.
template <typename Body>
void launch(Index grid, unsigned threads, size_t shared_bytes, const Body& body) {
  blockDim = {threads, 1};
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      std::vector<std::max_align_t> storage(shared_bytes / sizeof(std::max_align_t) + 1);
      shared_memory = reinterpret_cast<unsigned char*>(storage.data());
      std::fill_n(shared_memory, shared_bytes, 0xff);
      block = std::make_unique<Block>(threads);
      std::vector<std::thread> running;
      for (unsigned t = 0; t < threads; ++t)
        running.emplace_back([&, t] {
          threadIdx = {t, 0};
          blockIdx = {x, y};
          vote_round = 0;
          body();
          block->barrier.arrive_and_drop();
        });
      for (std::thread& thread : running) thread.join();
    }
}

}  // namespace emulation
