// Threads that live as long as the process, and a barrier for those that work on one step.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace {

class Barrier {
  public:
    explicit Barrier(int count) : count_(count) {}
    void wait() {
        const int turn = turn_.load(std::memory_order_acquire);
        if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
            waiting_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; spins++) {
            if (spins > 4000) std::this_thread::yield();  // somebody else has our partner's core
#if defined(__x86_64__)
            else __builtin_ia32_pause();
#endif
        }
    }

  private:
    const int count_;
    std::atomic<int> waiting_{0}, turn_{0};
};

// Threads that live as long as the process and run one job together.
class Pool {
  public:
    template <class Job>
    void run(int threads, const Job& job) {
        std::lock_guard<std::mutex> one(running_);
        if (threads <= 1) return job(0);
        struct Call {
            static void go(const void* job, int thread) { (*static_cast<const Job*>(job))(thread); }
        };
        while (int(workers_.size()) < threads - 1) {
            const int id = int(workers_.size()) + 1;
            workers_.emplace_back([this, id] { work(id); });
            workers_.back().detach();
        }
        left_.store(threads - 1, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job, call_ = &Call::go, threads_ = threads, round_++;
        }
        wake_.notify_all();
        job(0);
        while (left_.load(std::memory_order_acquire)) std::this_thread::yield();
    }

  private:
    void work(int id) {
        uint64_t seen = 0;
        for (;;) {
            const void* job;
            void (*call)(const void*, int);
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return round_ != seen && id < threads_; });
                seen = round_, job = job_, call = call_;
            }
            call(job, id);
            left_.fetch_sub(1, std::memory_order_acq_rel);
        }
    }

    std::mutex running_, mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    const void* job_ = nullptr;
    void (*call_)(const void*, int) = nullptr;
    int threads_ = 0;
    uint64_t round_ = 0;
    std::atomic<int> left_{0};
};

Pool& pool() {
    static Pool* pool = new Pool;  // never destroyed: its threads wait on it until the process ends
    return *pool;
}

}  // namespace
