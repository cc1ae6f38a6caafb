// Dividing the work of a kernel among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>

namespace megatron {

// Calls body(begin, end) for consecutive parts of [0, count), one a thread. `work`, in elements, is what all of it comes
// to: threads that would have less than some ten microseconds of it are not started. If bodies throw, one of their
// exceptions is thrown once all are done.
template <class Body>
void parallel_for(std::int64_t count, std::int64_t work, int threads, const Body& body) {
    constexpr std::int64_t least_work = 1 << 14;
    const std::int64_t useful = std::min(count, work / least_work);
    const std::int64_t parts = std::max<std::int64_t>(1, std::min<std::int64_t>(threads, useful));
    if (parts == 1) {
        if (count > 0) body(std::int64_t{0}, count);
        return;
    }
    std::exception_ptr failure;  // an exception that left a thread of OpenMP would end the process
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(parts))
    for (std::int64_t part = 0; part < parts; ++part) {
        try {
            body(part * count / parts, (part + 1) * count / parts);
        } catch (...) {
#pragma omp critical(megatron_parallel_for_failure)
            if (!failure) failure = std::current_exception();
        }
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace megatron
