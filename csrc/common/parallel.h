// The one place that starts threads. Work is handed out in fixed ranges of rows; what a row computes never depends on
// which thread computes it, so results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#if !defined(_OPENMP)
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace rlhf_fast {

// Calls body(begin, end) for ranges that together cover [0, rows), on at most `threads` threads. A range is at least
// about 128 thousand elements of rows of `columns`, so that handing it out costs nothing, and else an eighth of a
// thread's share: threads that write new memory side by side would both fault the same huge page in. With OpenMP, whose
// runtime torch has loaded already, the threads are torch's own.
template <class Body>
void parallel_rows(int64_t rows, int64_t columns, int threads, const Body& body) {
    const int64_t least = (int64_t{1} << 17) / std::max<int64_t>(columns, 1);
    const int64_t grain = std::max<int64_t>({least, rows / (8 * std::max(threads, 1)), 1});
    const int64_t ranges = (rows + grain - 1) / grain;
    threads = static_cast<int>(std::min<int64_t>(threads, ranges));
    if (threads <= 1) {
        if (rows > 0) body(int64_t{0}, rows);
        return;
    }
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < ranges; ++i) body(i * grain, std::min(rows, (i + 1) * grain));
#else
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t i = next++; i < ranges; i = next++) body(i * grain, std::min(rows, (i + 1) * grain));
    };
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
#endif
}

}  // namespace rlhf_fast
