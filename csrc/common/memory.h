// Large blocks of memory for results. Fresh memory costs more in page faults than the arithmetic that fills it, and a
// training step frees and asks for the same sizes again and again: so blocks lie in huge pages, and the last few that
// were freed are kept for the next call. Meanwhile the system may take their pages whenever it runs short.
#pragma once

#include <cstddef>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rlhf_fast {

#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_FREE)
#define RLHF_FAST_MEMORY 1

class Memory {
  public:
    explicit Memory(std::size_t bytes) : block_(take((bytes + kHugePage - 1) / kHugePage * kHugePage)), bytes_(bytes) {
        if (block_.data == nullptr) throw std::bad_alloc();
    }
    ~Memory() { keep(block_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    void* data() const { return block_.data; }
    std::size_t bytes() const { return bytes_; }

    // Gives all that is kept back to the system.
    static void release() {
        const std::lock_guard<std::mutex> lock(kept().mutex);
        for (const Block& block : kept().blocks) unmap(block);
        kept().blocks.clear();
    }

  private:
    struct Block {
        char* data = nullptr;
        std::size_t size = 0;    // whole huge pages
        char* mapped = nullptr;  // what the system gave, up to a huge page before data
    };
    struct Kept {
        std::mutex mutex;
        std::vector<Block> blocks;
    };

    static constexpr std::size_t kHugePage = std::size_t{2} << 20, kMostKept = 4;

    static Kept& kept() {
        static Kept* const all = new Kept;  // never destroyed: tensors may be freed after static objects
        return *all;
    }

    // The smallest kept block that is large enough but not twice too large, of equals the last one freed, or a new one.
    static Block take(std::size_t size) {
        const std::lock_guard<std::mutex> lock(kept().mutex);
        std::vector<Block>& blocks = kept().blocks;
        std::size_t best = blocks.size();
        for (std::size_t i = 0; i < blocks.size(); ++i) {
            const bool fits = blocks[i].size >= size && blocks[i].size <= 2 * size;
            if (fits && (best == blocks.size() || blocks[i].size <= blocks[best].size)) best = i;
        }
        if (best == blocks.size()) return map(size);
        const Block found = blocks[best];
        blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(best));
        return found;
    }

    // Keeps a block; of more than kMostKept the smallest goes.
    static void keep(const Block& block) {
        madvise(block.data, block.size, MADV_FREE);
        const std::lock_guard<std::mutex> lock(kept().mutex);
        std::vector<Block>& blocks = kept().blocks;
        blocks.push_back(block);
        if (blocks.size() <= kMostKept) return;
        std::size_t smallest = 0;
        for (std::size_t i = 1; i < blocks.size(); ++i) {
            if (blocks[i].size < blocks[smallest].size) smallest = i;
        }
        unmap(blocks[smallest]);
        blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(smallest));
    }

    static Block map(std::size_t size) {
        void* const mapped =
            mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) return {};
        char* const first = static_cast<char*>(mapped);
        const std::size_t beyond = reinterpret_cast<std::size_t>(first) % kHugePage;
        char* const data = beyond == 0 ? first : first + (kHugePage - beyond);
        madvise(data, size, MADV_HUGEPAGE);  // a hint: nothing depends on it
        return {data, size, first};
    }

    static void unmap(const Block& block) { munmap(block.mapped, block.size + kHugePage); }

    Block block_;
    std::size_t bytes_;
};

#endif

}  // namespace rlhf_fast
