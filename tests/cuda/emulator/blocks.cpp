// Blocks and clusters: their threads, their shared memory, what they leave behind.
#include "blocks.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <sys/mman.h>

namespace emulator {

static constexpr uint32_t canary_bytes = 64;
static constexpr uint8_t canary = 0xa5;
static constexpr uint32_t window = 1024; // where shared memory begins, as the hardware counts
static constexpr size_t region_bytes = 512 * 1024;
static uint32_t num_slots = 0;

// Regions with inaccessible memory around them: 1024-aligned, since the copy engine's swizzle works on addresses.
class Regions {
  public:
    char *take() {
        if (free_.empty()) {
            void *region =
                mmap(nullptr, 3 * region_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (region == MAP_FAILED)
                throw std::bad_alloc();
            char *middle = static_cast<char *>(region) + region_bytes;
            mprotect(middle, region_bytes, PROT_READ | PROT_WRITE);
            free_.push_back(middle);
        }
        char *region = free_.back();
        free_.pop_back();
        return region;
    }
    void give(char *region) { free_.push_back(region); }

  private:
    std::vector<char *> free_;
};

static Regions &regions() {
    static auto *all = new Regions; // mappings live as long as the process
    return *all;
}

static void set_canary(Block &block) {
    std::memset(block.memory + block.used_bytes, canary, canary_bytes);
    block.canaries.push_back(block.used_bytes);
    block.used_bytes += canary_bytes;
}

static void begin(Block &block, const Shape &shape) {
    block.num_threads = shape.threads;
    block.threads.resize(shape.threads);
    block.warps.resize(shape.threads / 32);
    for (uint32_t w = 0; w < block.warps.size(); ++w)
        block.warps[w] = {&block, &block.threads[w * 32], 0, 0, -1, {}, 0};
    for (uint32_t t = 0; t < shape.threads; ++t) {
        Thread &thread = block.threads[t];
        thread.index = {t, 0, 0};
        thread.block_index = block.index;
        thread.block = &block;
        thread.warp = &block.warps[t / 32];
        thread.lane = t % 32;
        thread.state = Thread::fresh;
        thread.copies_see_all = true;
        thread.registers = registers_at_start(*current_kernel);
    }
    block.free_registers = 0; // the pool: what warps gave back
    block.memory = regions().take();
    block.dynamic_bytes = shape.shared_bytes;
    block.used_bytes = (shape.shared_bytes + 15) / 16 * 16;
    std::memset(block.memory, poison, block.used_bytes);
    set_canary(block);
}

Cluster::~Cluster() {
    for (Block *block : blocks) {
        regions().give(block->memory);
        delete block;
    }
}

std::unique_ptr<Cluster> new_cluster(const Shape &shape, uint64_t number) {
    auto cluster = std::make_unique<Cluster>();
    const uint64_t row = shape.grid.x / shape.cluster;
    for (uint32_t rank = 0; rank < shape.cluster; ++rank) {
        Block *block = new Block{};
        cluster->blocks.push_back(block);
        block->index = {static_cast<uint32_t>(number % row) * shape.cluster + rank,
                        static_cast<uint32_t>(number / row % shape.grid.y),
                        static_cast<uint32_t>(number / row / shape.grid.y)};
        block->rank = rank;
        block->cluster = cluster.get();
        begin(*block, shape);
    }
    cluster->number = static_cast<uint32_t>(number);
    watch_cluster(*cluster);
    cluster->live_threads = shape.cluster * shape.threads;
    return cluster;
}

void end_cluster(Cluster &cluster) {
    unwatch_cluster(cluster);
    for (Block *block : cluster.blocks) {
        const std::string name = "block " + std::to_string(block->index.x);
        for (uint32_t where : block->canaries)
            for (uint32_t i = 0; i < canary_bytes; ++i)
                if (static_cast<uint8_t>(block->memory[where + i]) != canary)
                    fail(name + " wrote past the end of an object in its shared memory");
        for (const auto &[offset, barrier] : block->phase_barriers)
            if (barrier.bytes != 0)
                fail(name + " ended while its barrier at byte " + std::to_string(offset) + " expected " +
                     std::to_string(barrier.bytes) + " bytes");
    }
}

uint32_t registers_at_start(const Kernel &kernel) {
    return std::min<uint32_t>(65536 / (kernel.threads * kernel.blocks) / 8 * 8, 248);
}

uint32_t new_slot() { return num_slots++; }

char *shared_object(uint32_t slot, size_t bytes, size_t alignment) {
    Block &block = *current->block;
    if (block.objects.size() <= slot)
        block.objects.resize(num_slots);
    char *&object = block.objects[slot];
    if (!object) {
        const uint32_t size = static_cast<uint32_t>(bytes), align = static_cast<uint32_t>(alignment);
        block.static_bytes = (block.static_bytes + align - 1) / align * align + size;
        if (block.static_bytes > static_shared_limit)
            fail("a block declares " + std::to_string(block.static_bytes) + " bytes of shared objects, more than " +
                 std::to_string(static_shared_limit));
        if (block.static_bytes + block.dynamic_bytes > shared_limit)
            fail("a block's shared memory has " + std::to_string(block.static_bytes + block.dynamic_bytes) +
                 " bytes, more than " + std::to_string(shared_limit));
        block.used_bytes = (block.used_bytes + align - 1) / align * align;
        object = block.memory + block.used_bytes;
        std::memset(object, poison, size);
        block.used_bytes += size;
        set_canary(block);
    }
    return object;
}

uint32_t shared_address(const void *pointer) {
    for (const Block *block : current->block->cluster->blocks) {
        const ptrdiff_t offset = static_cast<const char *>(pointer) - block->memory;
        if (offset >= 0 && offset < static_cast<ptrdiff_t>(block->used_bytes))
            return window + static_cast<uint32_t>(offset) + (block == current->block ? 0 : (block->rank + 1) << 24);
    }
    fail("an address outside of shared memory where one in it is expected");
}

char *shared_pointer(const Block &block, uint32_t address, size_t bytes, const char *word) {
    const uint32_t offset = (address & 0xffffff) - window;
    if (offset >= block.used_bytes || offset + bytes > block.used_bytes)
        fail(std::string(word) + " goes outside of the block's shared memory");
    if (block.exited == block.num_threads)
        fail(std::string(word) + " goes to a block that has exited");
    return block.memory + offset;
}

char *shared_pointer(uint32_t address, size_t bytes, const char *word) {
    const uint32_t rank = address >> 24;
    return shared_pointer(rank ? block_of_cluster(rank - 1, word) : *current->block, address, bytes, word);
}

Block &block_of_cluster(uint32_t rank, const char *word) {
    Cluster &cluster = *current->block->cluster;
    if (rank >= cluster.blocks.size())
        fail(std::string(word) + " names a block that the cluster does not have");
    return *cluster.blocks[rank];
}

} // namespace emulator
