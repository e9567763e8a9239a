// The copy engine: tiles through tensor maps, and cp.async.
#include "copies.h"

#include <algorithm>
#include <cstring>
#include <deque>

namespace emulator {

// A part of a tile on its way. Stores read shared memory at some time between the asking and wait_stores(false), and
// write global memory at some time before wait_stores(true).
struct Tile {
    bool stores; // or loads
    TensorMap map;
    int32_t x, y; // of the first row of this part
    uint32_t rows;
    Block *block;     // whose shared memory
    uint32_t address; // of the tile
    uint32_t first_row;
    uint32_t barrier;
    const Thread *owner;
    bool committed, read;
    Moment time;
    std::vector<char> data;

    uint32_t row_bytes() const { return map.box_cols * map.item_bytes; }
};

static std::vector<Tile> under_way;

// Of a thread: groups of cp.async, and when its stores read shared memory.
struct Copies {
    struct Copy {
        char *to;
        const char *from; // null: zeros
        uint32_t bytes;
    };
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
    std::vector<Moment> open_stores, committed_stores;
};

static Copies &copies_of(Thread &thread) {
    if (!thread.copies)
        thread.copies = std::make_shared<Copies>();
    return *thread.copies;
}

// Moves a row of the box between the array and `row`; what lies outside the array is zero and is not written.
template <class Move> static void for_the_part_inside(const Tile &tile, int64_t y, Move &&move) {
    if (y < 0 || y >= static_cast<int64_t>(tile.map.rows))
        return;
    const int64_t first = std::max<int64_t>(tile.x, 0);
    const int64_t end = std::min<int64_t>(int64_t{tile.x} + tile.map.box_cols, static_cast<int64_t>(tile.map.cols));
    if (first < end)
        move(tile.map.data + y * static_cast<int64_t>(tile.map.row_bytes) + first * tile.map.item_bytes,
             static_cast<size_t>(first - tile.x) * tile.map.item_bytes,
             static_cast<size_t>(end - first) * tile.map.item_bytes);
}

// Row r of the part, in chunks of 16 bytes, where the swizzle puts them.
template <class Move> static void for_chunks(const Tile &tile, uint32_t r, Move &&move) {
    for (uint32_t c = 0; c < tile.row_bytes(); c += 16) {
        const uint32_t address = tile.map.place(tile.address + (tile.first_row + r) * tile.row_bytes() + c);
        move(shared_pointer(*tile.block, address, 16, "a tile"), c);
    }
}

static void read_shared(Tile &tile) {
    tile.data.resize(size_t{tile.rows} * tile.row_bytes());
    for (uint32_t r = 0; r < tile.rows; ++r)
        for_chunks(tile, r, [&](const char *chunk, uint32_t c) {
            std::memcpy(&tile.data[r * tile.row_bytes() + c], chunk, 16);
        });
    tile.read = true;
}

static void write_global(const Tile &tile) {
    for (uint32_t r = 0; r < tile.rows; ++r)
        for_the_part_inside(tile, int64_t{tile.y} + r, [&](char *to, size_t offset, size_t bytes) {
            const char *row = &tile.data[r * tile.row_bytes()] + offset;
            std::memcpy(to, row, bytes);
        });
}

static void write_shared(const Tile &tile) {
    std::vector<char> row(tile.row_bytes());
    for (uint32_t r = 0; r < tile.rows; ++r) {
        std::fill(row.begin(), row.end(), char{0});
        for_the_part_inside(tile, int64_t{tile.y} + r, [&](const char *from, size_t offset, size_t bytes) {
            std::memcpy(&row[offset], from, bytes);
        });
        for_chunks(tile, r, [&](char *chunk, uint32_t c) { std::memcpy(chunk, &row[c], 16); });
    }
}

static void land(Tile tile) {
    if (tile.stores) {
        if (!tile.read)
            read_shared(tile);
        return write_global(tile);
    }
    if (tile.block->exited == tile.block->num_threads)
        fail("a copy lands in block " + std::to_string(tile.block->index.x) + ", which has exited");
    write_shared(tile);
    barrier_complete(*tile.block, tile.barrier, tile.rows * tile.row_bytes(), tile.time);
}

static Tile take(size_t index) {
    std::swap(under_way[index], under_way.back());
    Tile tile = std::move(under_way.back());
    under_way.pop_back();
    return tile;
}

bool copies_under_way() { return !under_way.empty(); }

// Stores that nobody waits for may take as long as many loads do: mostly loads while there are any, and nothing
// sometimes where a store's turn could be later too.
void land_a_copy(bool must) {
    const auto any = [] { return random_below(static_cast<uint32_t>(under_way.size())); };
    uint32_t index = any();
    for (uint32_t tries = 0; tries < 16 && under_way[index].stores; ++tries)
        index = any();
    if (must || !under_way[index].stores || random_below(64) == 0)
        land(take(index));
}

void land_all_copies() {
    while (!under_way.empty())
        land_a_copy(true);
}

void forget_copies() { under_way.clear(); }

void copies_of_exiting_block(Block &block) {
    for (Tile &tile : under_way) {
        if (tile.block != &block)
            continue;
        if (!tile.stores)
            fail("exits as the last of its block while copies into the block's shared memory are under way");
        if (!tile.read)
            fail("exits as the last of its block before the block's stores have read its shared memory");
        tile.owner = nullptr;
    }
}

const TensorMap &checked_map(const void *map, const char *word) {
    const auto &checked = *static_cast<const TensorMap *>(map);
    if (reinterpret_cast<uintptr_t>(map) % 128 || checked.mark != TensorMap::written)
        fail(std::string(word) + " with something that is no tensor map");
    if (checked.swizzle_bytes && checked.box_cols * checked.item_bytes != checked.swizzle_bytes)
        fail(std::string(word) + ": rows of a box that are narrower than the swizzle are not emulated");
    return checked;
}

static void check_address(uint32_t address, const char *word) {
    if (address % 128)
        fail(std::string(word) + " with a tile in shared memory at no multiple of 128");
}

// In one to three parts.
static void ask_for(const Tile &tile) {
    const uint32_t parts = std::min(tile.rows, 1 + random_below(3));
    for (uint32_t p = 0; p < parts; ++p) {
        const uint32_t first = tile.rows * p / parts, end = tile.rows * (p + 1) / parts;
        Tile part = tile;
        part.first_row = first;
        part.rows = end - first;
        part.y += static_cast<int32_t>(first);
        under_way.push_back(std::move(part));
    }
}

void load_tile(uint32_t to, const void *map, int32_t x, int32_t y, uint32_t barrier, uint32_t ranks) {
    const TensorMap &checked = checked_map(map, "load_tile");
    check_address(to, "load_tile");
    for (uint32_t rank = 0; rank < 16; ++rank)
        if (ranks >> rank & 1) {
            Tile tile{};
            tile.map = checked;
            tile.x = x;
            tile.y = y;
            tile.rows = checked.box_rows;
            tile.block = &block_of_cluster(rank, "load_tile");
            tile.address = to;
            tile.barrier = barrier;
            const size_t bytes = size_t{tile.rows} * tile.row_bytes();
            char *place = shared_pointer(*tile.block, to, bytes, "load_tile");
            check_initialised(*tile.block, barrier, "load_tile");
            tile.time = watch_load(*tile.block, place, bytes, barrier);
            std::memset(place, poison, bytes); // what was there is lost from now on
            ask_for(tile);
        }
}

void store_tile(const void *map, int32_t x, int32_t y, uint32_t from) {
    const char *word = "store_tile";
    if (current->wrote_shared || !current->copies_see_all)
        fail("store_tile of what was written without fence_shared_for_copies before the barrier");
    Tile tile{};
    tile.stores = true;
    tile.map = checked_map(map, word);
    tile.x = x;
    tile.y = y;
    tile.rows = tile.map.box_rows;
    tile.block = current->block;
    tile.address = from;
    tile.owner = current;
    check_address(from, word);
    const size_t bytes = size_t{tile.rows} * tile.row_bytes();
    copies_of(*current).open_stores.push_back(watch_store(shared_pointer(from, bytes, word), bytes));
    if (random_below(2))
        read_shared(tile);
    under_way.push_back(std::move(tile));
}

void writes_shared(bool unfenced) { current->wrote_shared = unfenced; }

void commit_stores() {
    for (Tile &tile : under_way)
        if (tile.owner == current)
            tile.committed = true;
    Copies &mine = copies_of(*current);
    mine.committed_stores.insert(mine.committed_stores.end(), mine.open_stores.begin(), mine.open_stores.end());
    mine.open_stores.clear();
}

void wait_stores(bool until_written) {
    for (size_t i = 0; i < under_way.size();) {
        Tile &tile = under_way[i];
        const bool waits = tile.owner == current && tile.committed;
        if (waits && !tile.read)
            read_shared(tile);
        if (waits && until_written)
            land(take(i));
        else
            ++i;
    }
    Copies &mine = copies_of(*current);
    for (const Moment &time : mine.committed_stores)
        acquire_copy(time);
    mine.committed_stores.clear();
    maybe_pause();
}

void copy_async(void *to, const void *from, uint32_t bytes, bool valid) {
    if (reinterpret_cast<uintptr_t>(to) % bytes || (valid && reinterpret_cast<uintptr_t>(from) % bytes))
        fail("copy_async with an address that is no multiple of its " + std::to_string(bytes) + " bytes");
    shared_address(to);
    watch(to, bytes, Access::write);
    std::memset(to, poison, bytes);
    copies_of(*current).open.push_back(
        {static_cast<char *>(to), valid ? static_cast<const char *>(from) : nullptr, bytes});
}

void end_copies() {
    Copies &copies = copies_of(*current);
    copies.groups.push_back(std::move(copies.open));
    copies.open.clear();
}

void wait_copies(uint32_t pending) {
    Copies &copies = copies_of(*current);
    for (; copies.groups.size() > pending; copies.groups.pop_front())
        for (const Copies::Copy &copy : copies.groups.front()) {
            watch(copy.to, copy.bytes, Access::write);
            if (copy.from)
                watch(copy.from, copy.bytes, Access::read);
            if (copy.from)
                std::memcpy(copy.to, copy.from, copy.bytes);
            else
                std::memset(copy.to, 0, copy.bytes);
        }
}

} // namespace emulator
