#include "products.h"

#include <cmath>
#include <cstring>
#include <deque>
#include <limits>

#include "cuda/device.cuh"
#include "refusals.h"

namespace emulator {

namespace {

// What every code of an 8-bit format means.
struct Fp8Values {
    float e4m3[256], e5m2[256];
    Fp8Values() {
        for (int code = 0; code < 256; ++code) {
            e4m3[code] = value(code, 3, 7);
            e5m2[code] = value(code, 2, 15);
        }
        e4m3[0x7f] = e4m3[0xff] = std::numeric_limits<float>::quiet_NaN();
        for (int sign = 0; sign < 256; sign += 128) {
            e5m2[sign | 0x7c] = sign ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::infinity();
            for (int low = 1; low < 4; ++low)
                e5m2[sign | 0x7c | low] = std::numeric_limits<float>::quiet_NaN();
        }
    }
    static float value(int code, int bits, int bias) {
        const int exponent = (code & 0x7f) >> bits, mantissa = code & ((1 << bits) - 1);
        const double magnitude = exponent ? std::ldexp(mantissa + (1 << bits), exponent - bias - bits)
                                          : std::ldexp(mantissa, 1 - bias - bits);
        return static_cast<float>(code & 0x80 ? -magnitude : magnitude);
    }
};
const Fp8Values fp8;

bool is_fp8(Items items) { return items != Items::bf16 && items != Items::f16; }

// The items of some bytes, as float.
void decode(Items items, bool of_a, const uint8_t *bytes, uint32_t num_bytes, float *to, size_t step) {
    if (is_fp8(items)) {
        const bool e5m2 = items == Items::e5m2 || items == (of_a ? Items::e5m2_by_e4m3 : Items::e4m3_by_e5m2);
        const float *values = e5m2 ? fp8.e5m2 : fp8.e4m3;
        for (uint32_t i = 0; i < num_bytes; ++i)
            to[i * step] = values[bytes[i]];
        return;
    }
    for (uint32_t i = 0; i < num_bytes / 2; ++i) {
        uint16_t half;
        std::memcpy(&half, bytes + 2 * i, 2);
        to[i * step] = items == Items::bf16 ? pyroute::cuda::bf16_to_f32(half) : pyroute::cuda::f16_to_f32(half);
    }
}

// sums[r][c] += a[r][k] b[k][c]
template <uint32_t Width>
void add_products(float (*sums)[Width], const float (*a)[32], const float (*b)[Width], uint32_t depth,
                  uint32_t columns) {
    for (uint32_t r = 0; r < 16; ++r)
        for (uint32_t k = 0; k < depth; ++k)
            for (uint32_t c = 0; c < columns; ++c)
                sums[r][c] += a[r][k] * b[k][c];
}

// The same with `bits` bits: the sum so far and the products are cut off, towards zero, that many bits from the leading
// one of the largest of them, and then added exactly. "Around 14 bits" is what DeepSeek measured of Hopper's FP8
// products (DeepSeek-V3 technical report, section 3.3.2).
template <uint32_t Width>
void add_cut_off(int bits, float (*sums)[Width], const float (*a)[32], const float (*b)[Width], uint32_t depth,
                 uint32_t columns) {
    for (uint32_t r = 0; r < 16; ++r)
        for (uint32_t c = 0; c < columns; ++c) {
            float terms[33], largest = 0.0f, plain = 0.0f;
            for (uint32_t k = 0; k <= depth; ++k) {
                terms[k] = k < depth ? a[r][k] * b[k][c] : sums[r][c];
                plain += terms[k];
                largest = std::fabs(terms[k]) > largest ? std::fabs(terms[k]) : largest;
            }
            if (largest == 0.0f || !std::isfinite(plain)) {
                sums[r][c] = plain;
                continue;
            }
            const float unit = std::ldexp(1.0f, std::ilogb(largest) - (bits - 1));
            int32_t units = 0;
            for (uint32_t k = 0; k <= depth; ++k)
                units += static_cast<int32_t>(terms[k] / unit);
            sums[r][c] = static_cast<float>(units) * unit;
        }
}

template <uint32_t Width>
void add_products(Items items, float (*sums)[Width], const float (*a)[32], const float (*b)[Width], uint32_t depth,
                  uint32_t columns) {
    const int bits = is_fp8(items) ? emulated_fp8_bits() : 0;
    if (bits > 0)
        add_cut_off(bits, sums, a, b, depth, columns);
    else
        add_products(sums, a, b, depth, columns);
}

struct Fragments {
    Items items;
    float *d;
    const uint32_t *a, *b;
};

void multiply_fragments(Warp &warp) {
    static float a[16][32], b[32][8], sums[16][8];
    const Items items = operands_of<Fragments>(warp, 0).items;
    const uint32_t per_word = is_fp8(items) ? 4 : 2;
    for (uint32_t lane = 0; lane < 32; ++lane) {
        const auto &given = operands_of<Fragments>(warp, lane);
        const uint32_t q = lane % 4, r = lane / 4;
        if (given.items != items)
            fail("lanes of a warp ask for different products");
        for (uint32_t i = 0; i < 4; ++i)
            decode(items, true, reinterpret_cast<const uint8_t *>(given.a + i), 4,
                   &a[r + i % 2 * 8][(q + i / 2 * 4) * per_word], 1);
        for (uint32_t i = 0; i < 2; ++i)
            decode(items, false, reinterpret_cast<const uint8_t *>(given.b + i), 4, &b[(q + i * 4) * per_word][r], 8);
        for (uint32_t i = 0; i < 4; ++i)
            sums[r + i / 2 * 8][2 * q + i % 2] = given.d[i];
    }
    add_products(items, sums, a, b, 8 * per_word, 8);
    for (uint32_t lane = 0; lane < 32; ++lane)
        for (uint32_t i = 0; i < 4; ++i)
            operands_of<Fragments>(warp, lane).d[i] = sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

} // namespace

void multiply(Items items, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const Fragments operands{items, d, a, b};
    meet_all(Collective::multiply, &operands, multiply_fragments);
}

namespace {

struct MatrixRows {
    const char *row; // of this lane
    uint32_t *words; // four
    bool transposed;
};

void move_matrices(Warp &warp, bool loads) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
        const auto &given = operands_of<MatrixRows>(warp, lane);
        for (uint32_t m = 0; m < 4; ++m)
            for (uint32_t half = 0; half < 2; ++half) {
                uint32_t row = lane / 4, item = lane % 4 * 2 + half;
                if (given.transposed)
                    std::swap(row, item);
                char *place = const_cast<char *>(operands_of<MatrixRows>(warp, 8 * m + row).row) + 2 * item;
                char *word = reinterpret_cast<char *>(given.words + m) + 2 * half;
                std::memcpy(loads ? word : place, loads ? place : word, 2);
            }
    }
}

} // namespace

void load_matrices(uint32_t (&d)[4], const void *row, bool transposed) {
    if (reinterpret_cast<uintptr_t>(row) % 16)
        fail("load_matrices with an address that is no multiple of 16");
    shared_address(row);
    watch(row, 16, Access::read);
    const MatrixRows operands{static_cast<const char *>(row), d, transposed};
    meet_all(Collective::load_matrices, &operands, [](Warp &warp) { move_matrices(warp, true); });
}

void store_matrices(uint32_t row, const uint32_t (&m)[4]) {
    if (row % 16)
        fail("store_matrices with an address that is no multiple of 16");
    uint32_t words[4];
    std::memcpy(words, m, sizeof(words));
    const MatrixRows operands{shared_pointer(row, 16, "store_matrices"), words, false};
    current->wrote_shared = true;
    watch(operands.row, 16, Access::write);
    meet_all(Collective::store_matrices, &operands, [](Warp &warp) { move_matrices(warp, false); });
}

// ---- wgmma

struct Products {
    struct Product {
        Items items;
        float *d;
        uint32_t columns;
        uint64_t a, b;
        bool transposed_a, transposed_b, add;

        bool same(const Product &other) const {
            return items == other.items && columns == other.columns && a == other.a && b == other.b &&
                   transposed_a == other.transposed_a && transposed_b == other.transposed_b && add == other.add;
        }
    };
    struct Sums {
        float *d;
        std::vector<float> values;
    };
    std::vector<Product> open;
    std::deque<std::vector<Product>> groups;
    std::vector<Sums> sums; // what the registers really hold while they show NaN
    bool fenced = false;
    uint32_t pending = 0; // of the wait that it is in

    Sums *find(const float *d) {
        for (Sums &entry : sums)
            if (entry.d == d)
                return &entry;
        return nullptr;
    }
    bool in_use(const float *d) const {
        for (const auto &group : groups)
            for (const Product &product : group)
                if (product.d == d)
                    return true;
        for (const Product &product : open)
            if (product.d == d)
                return true;
        return false;
    }
};

static Products &products_of(Thread &thread) {
    if (!thread.products)
        thread.products = std::make_shared<Products>();
    return *thread.products;
}

void matrix_fence() { products_of(*current).fenced = true; }

void queue_product(Items items, float *d, uint32_t columns, uint64_t a, uint64_t b, bool transposed_a,
                   bool transposed_b, bool add) {
    Products &mine = products_of(*current);
    if (!mine.fenced)
        fail("a matrix product without matrix_fence after the registers were last free");
    if (current->wrote_shared || !current->copies_see_all)
        fail("a matrix product after writes without fence_shared_for_copies before the barrier");
    if (!mine.find(d))
        mine.sums.push_back({d, std::vector<float>(d, d + columns / 2)});
    std::fill(d, d + columns / 2, std::numeric_limits<float>::quiet_NaN());
    mine.open.push_back({items, d, columns, a, b, transposed_a, transposed_b, add});
}

void matrix_commit() {
    Products &mine = products_of(*current);
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}

namespace {

constexpr uint32_t most_columns = 256;
float wide_a[16][32], wide_b[32][most_columns], wide_sums[16][most_columns];

// An operand in shared memory, with the 128-byte swizzle.
struct Operand {
    const Block &block;
    uint32_t start, leading, stride;

    Operand(const Block &of, uint64_t descriptor, bool transposed)
        : block(of), start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
          leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
          stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4) {
        if (descriptor >> 62 != 1)
            fail("a matrix descriptor without the 128-byte swizzle is not emulated");
        if (descriptor >> 49 & 7)
            fail("a matrix descriptor with a base offset is not emulated");
        if (start >> 7 & 7)
            fail("a matrix descriptor starts inside of 8 rows that the swizzle permutes together");
        if (stride % 1024 || (transposed && leading % 1024))
            fail("a matrix descriptor's strides are no multiples of 1024 bytes");
    }
    // 16 bytes at an address before the swizzle.
    const uint8_t *chunk(uint32_t address) const {
        address ^= (address >> 7 & 7) << 4;
        const char *bytes = shared_pointer(block, address, 16, "a matrix product");
        watch(bytes, 16, Access::read);
        return reinterpret_cast<const uint8_t *>(bytes);
    }
    // Items [row, k] to to[row * row_step + k * depth_step], of `rows` rows from `first` on.
    void decode_rows(const Products::Product &product, bool of_a, uint32_t first, uint32_t rows, float *to,
                     size_t row_step, size_t depth_step) const {
        if (!(of_a ? product.transposed_a : product.transposed_b)) {
            for (uint32_t r = first; r < first + rows; ++r)
                for (uint32_t c = 0; c < 2; ++c) {
                    const uint32_t items = is_fp8(product.items) ? 16 : 8;
                    decode(product.items, of_a, chunk(start + r / 8 * stride + r % 8 * 128 + 16 * c), 16,
                           to + (r - first) * row_step + c * items * depth_step, depth_step);
                }
            return;
        }
        for (uint32_t k = 0; k < 16; ++k)
            for (uint32_t r = first; r < first + rows; r += 8)
                decode(product.items, of_a, chunk(start + k / 8 * stride + k % 8 * 128 + r / 64 * leading + r % 64 * 2),
                       16, to + (r - first) * row_step + k * depth_step, row_step);
    }
};

void run_product(Warp &warp, size_t group, size_t index) {
    const auto product_of = [&](uint32_t lane) -> const Products::Product & {
        return products_of(warp.threads[lane]).groups[group][index];
    };
    const Products::Product &product = product_of(0);
    const Block &block = *warp.block;
    for (const uint64_t what :
         {product.a, product.b,
          uint64_t{product.columns} << 8 | static_cast<uint64_t>(product.items) << 4 |
              uint64_t{product.transposed_a} << 2 | uint64_t{product.transposed_b} << 1 | uint64_t{product.add}})
        say_as_warpgroup(warp, what);
    const uint32_t number = warp.threads[0].index.x / 32 % 4; // in its warpgroup
    Operand(block, product.a, product.transposed_a).decode_rows(product, true, 16 * number, 16, &wide_a[0][0], 32, 1);
    Operand(block, product.b, product.transposed_b)
        .decode_rows(product, false, 0, product.columns, &wide_b[0][0], 1, most_columns);

    std::vector<float> *values[32];
    for (uint32_t lane = 0; lane < 32; ++lane) {
        values[lane] = &products_of(warp.threads[lane]).find(product_of(lane).d)->values;
        for (uint32_t i = 0; i < product.columns / 2; ++i)
            wide_sums[lane / 4 + (i & 2) * 4][i / 4 * 8 + lane % 4 * 2 + (i & 1)] =
                product.add ? (*values[lane])[i] : 0.0f;
    }
    add_products(product.items, wide_sums, wide_a, wide_b, is_fp8(product.items) ? 32 : 16, product.columns);
    for (uint32_t lane = 0; lane < 32; ++lane)
        for (uint32_t i = 0; i < product.columns / 2; ++i)
            (*values[lane])[i] = wide_sums[lane / 4 + (i & 2) * 4][i / 4 * 8 + lane % 4 * 2 + (i & 1)];
}

void run_groups(Warp &warp) {
    Products &first = products_of(warp.threads[0]);
    for (uint32_t lane = 1; lane < 32; ++lane) {
        const Products &other = products_of(warp.threads[lane]);
        if (other.pending != first.pending || other.groups.size() != first.groups.size())
            fail("lanes of a warp wait for different matrix products");
        for (size_t g = 0; g < first.groups.size(); ++g) {
            bool same = other.groups[g].size() == first.groups[g].size();
            for (size_t i = 0; same && i < first.groups[g].size(); ++i)
                same = other.groups[g][i].same(first.groups[g][i]);
            if (!same)
                fail("lanes of a warp ask for different matrix products");
        }
    }
    while (first.groups.size() > first.pending) {
        for (size_t i = 0; i < first.groups.front().size(); ++i)
            run_product(warp, 0, i);
        for (uint32_t lane = 0; lane < 32; ++lane)
            products_of(warp.threads[lane]).groups.pop_front();
    }
    for (uint32_t lane = 0; lane < 32; ++lane) {
        Products &products = products_of(warp.threads[lane]);
        std::vector<Products::Sums> kept;
        for (Products::Sums &sums : products.sums)
            if (products.in_use(sums.d))
                kept.push_back(std::move(sums));
            else
                std::copy(sums.values.begin(), sums.values.end(), sums.d);
        products.sums = std::move(kept);
        products.fenced = false;
    }
}

} // namespace

void matrix_wait(uint32_t pending) {
    if (current->index.x / 128 * 128 + 128 > current->block->num_threads)
        fail("a matrix product by fewer than the four warps of a warpgroup");
    products_of(*current).pending = pending;
    meet_all(Collective::matrix_wait, nullptr, run_groups);
}

// ---- setmaxnreg

static uint32_t count_of(const Warp &warp) {
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(warp.threads[0].operands));
}

static void set_registers(Warp &warp, uint32_t count) {
    for (uint32_t lane = 0; lane < 32; ++lane)
        warp.threads[lane].registers = count;
}

void change_registers(uint32_t count, bool gives) {
    Thread &me = *current;
    Block &block = *me.block;
    const char *word = gives ? "give_registers" : "take_registers";
    if (count % 8 || count < 24 || count > 256)
        fail(std::string(word) + " with a count of " + std::to_string(count));
    if (gives ? count > me.registers : count < me.registers)
        fail(std::string(word) + ": " + std::to_string(count) + ", but a thread has " + std::to_string(me.registers));
    const auto *operand = reinterpret_cast<const void *>(static_cast<uintptr_t>(count));
    if (gives)
        return meet_all(Collective::give_registers, operand, [](Warp &warp) {
            say_as_warpgroup(warp, count_of(warp));
            warp.block->free_registers += 32 * (warp.threads[0].registers - count_of(warp));
            set_registers(warp, count_of(warp));
            for (Thread *thread : warp.block->waiting_for_registers)
                wake(*thread);
            warp.block->waiting_for_registers.clear();
        });
    meet_all(Collective::take_registers, operand, [](Warp &warp) { say_as_warpgroup(warp, count_of(warp)); });
    // the first lane to see enough takes them for its warp
    while (me.registers != count) {
        const uint32_t needed = 32 * (count - me.registers);
        if (block.free_registers >= needed) {
            block.free_registers -= needed;
            set_registers(*me.warp, count);
        } else {
            block.waiting_for_registers.push_back(&me);
            wait("take_registers");
        }
    }
}

} // namespace emulator
