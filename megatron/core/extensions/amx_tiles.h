// Matrix tiles of processors with Intel AMX: products, packing, the exponential beside them. See amx_attention.cpp.
//
// A tile is 16 rows of 64 bytes, here always adjacent in memory. A product C += A B of tiles takes A as 16 rows of 32
// numbers, and B, which has 32 rows of 16, as 16 rows of pairs: number c of row r is (B[2r, c], B[2r+1, c]). So 32 rows
// of a matrix X [s, d] can be packed as
//   rows              A tiles of X: [d/32][2][16 positions][32 channels]
//   rows, transposed  B tiles of X^T: [d/32][2][16 pairs of channels][16 positions]
//   pairs             B tiles of X: [d/16][16 pairs of positions][16 channels]
//   pairs, transposed A tiles of X^T: [d/16][16 channels][32 positions]
// where "transposed" transposes each tile as 16 x 16 words of 32 bits. Each takes 32 d numbers; lengths are filled up
// with zeros to whole blocks of 32.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 14) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11))
#define HAS_AMX 1
#include <immintrin.h>
#else
#define HAS_AMX 0
#endif

#if HAS_AMX

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

namespace megatron::amx {

using std::int64_t;
using bits16 = std::uint16_t;  // a bf16 number as it lies in memory

// Functions with tiles or wide vectors; what calls them is compiled for any processor.
#define AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

constexpr int64_t block = 32;          // positions that are packed together
constexpr int64_t tile = 512;          // numbers of a bf16 tile
constexpr std::size_t alignment = 64;  // of packed data, a tile's row

inline int64_t padded(int64_t length) { return (length + block - 1) / block * block; }

// Positions and channels [s, d] of a head; channels are adjacent, positions `stride` numbers apart.
struct Matrix {
    bits16* data;
    int64_t stride, length;
};

// Uninitialised memory of a thread, handed out in aligned parts.
class Workspace {
   public:
    explicit Workspace(std::size_t size) : size_(size + alignment), memory_(new char[size_]) {
        const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
        used_ = (alignment - address % alignment) % alignment;
    }
    template <class T>
    T* take(int64_t count) {
        T* result = reinterpret_cast<T*>(memory_.get() + used_);
        used_ += bytes<T>(count);
        return result;
    }
    template <class T>
    static std::size_t bytes(int64_t count) {
        return (count * sizeof(T) + alignment - 1) / alignment * alignment;
    }

   private:
    std::size_t size_, used_;
    std::unique_ptr<char[]> memory_;
};

// All eight tiles are 16 rows of 64 bytes, from construction to destruction; other users of tiles configure their own.
class TileConfiguration {
   public:
    AMX TileConfiguration() {
        struct alignas(64) {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } configuration;
        static_assert(sizeof(configuration) == 64, "the layout is the processor's");
        _tile_loadconfig(&configuration);
    }
    AMX ~TileConfiguration() { _tile_release(); }
};

// C [32, 32] = or += A [32, 32 steps] B [32 steps, 32]. Of A the two tiles of a step are adjacent, and of B; the steps
// are `a_step` and `b_step` numbers apart.
AMX __attribute__((noinline)) inline void multiply(const bits16* a, int64_t a_step, const bits16* b, int64_t b_step,
                                            int64_t steps, float* c, int64_t c_stride, bool add) {
    asm volatile("" ::: "memory");  // compilers do not know that tiles are read from memory
    const int64_t c_bytes = c_stride * 4;
    if (add) {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(1, c + 16, c_bytes);
        _tile_loadd(2, c + 16 * c_stride, c_bytes);
        _tile_loadd(3, c + 16 * c_stride + 16, c_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step, a += a_step, b += b_step) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + tile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + tile, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
    _tile_stored(2, c + 16 * c_stride, c_bytes);
    _tile_stored(3, c + 16 * c_stride + 16, c_bytes);
}

// 32 channels of a position, zeros after the end.
AMX inline __m512i load_position(const Matrix& x, int64_t position, int64_t channel) {
    if (position >= x.length) return _mm512_setzero_si512();
    return _mm512_loadu_si512(x.data + position * x.stride + channel);
}

// "rows" of the positions [first, first + 32).
AMX inline void pack_rows(const Matrix& x, int64_t channels, int64_t first, bits16* out) {
    for (int64_t c = 0; c < channels; c += 32)
        for (int64_t s = 0; s < block; ++s, out += 32) _mm512_store_si512(out, load_position(x, first + s, c));
}

// The order of 16 pairs (a, b) in a vector of 16 a and 16 b.
AMX inline __m512i pair_order() {
    const __m512i a = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_or_si512(a, _mm512_slli_epi32(_mm512_add_epi32(a, _mm512_set1_epi32(16)), 16));
}

// "pairs" of the positions [first, first + 32).
AMX inline void pack_pairs(const Matrix& x, int64_t channels, int64_t first, bits16* out) {
    const __m512i order = pair_order();
    for (int64_t c = 0; c < channels; c += 32, out += 2 * tile) {
        for (int64_t r = 0; r < 16; ++r) {
            const __m512i a = load_position(x, first + 2 * r, c), b = load_position(x, first + 2 * r + 1, c);
            const __m512i low = _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1);
            const __m512i high = _mm512_shuffle_i64x2(a, b, 0xee);
            _mm512_store_si512(out + r * 32, _mm512_permutexvar_epi16(order, low));
            _mm512_store_si512(out + tile + r * 32, _mm512_permutexvar_epi16(order, high));
        }
    }
}

// Transposes tiles as 16 x 16 words of 32 bits, in place.
AMX inline void transpose_tiles(bits16* tiles, int64_t count) {
    for (; count > 0; --count, tiles += tile) {
        __m512i a[16], b[16];
        for (int i = 0; i < 16; ++i) a[i] = _mm512_load_si512(tiles + i * 32);
        for (int i = 0; i < 16; i += 2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {  // a[i + c]: column c of the rows [i, i + 4), a quarter for each of c + 4 m
            a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
            a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
            a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
            a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
        }
        for (int c = 0; c < 4; ++c) {
            const __m512i top_even = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x88);
            const __m512i top_odd = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xdd);
            const __m512i bottom_even = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x88);
            const __m512i bottom_odd = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xdd);
            _mm512_store_si512(tiles + c * 32, _mm512_shuffle_i32x4(top_even, bottom_even, 0x88));
            _mm512_store_si512(tiles + (c + 4) * 32, _mm512_shuffle_i32x4(top_odd, bottom_odd, 0x88));
            _mm512_store_si512(tiles + (c + 8) * 32, _mm512_shuffle_i32x4(top_even, bottom_even, 0xdd));
            _mm512_store_si512(tiles + (c + 12) * 32, _mm512_shuffle_i32x4(top_odd, bottom_odd, 0xdd));
        }
    }
}

// exp(x) of the lanes, x <= 0 or NaN, to about 3e-6 of itself; 0 below -87.3 and in the other lanes.
AMX inline __m512 exponential(__mmask16 lanes, __m512 x) {
    const __m512 exponent = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
    const __m512 r = _mm512_reduce_ps(exponent, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // the fraction, in [0, 1)
    __m512 p = _mm512_set1_ps(1.35341680e-2f);  // 2^r, the best polynomial of degree 4
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.20114611e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.41442756e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93003835e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.00000259f));
    lanes = _mm512_mask_cmp_ps_mask(lanes, x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(lanes, p, exponent);  // p * 2^floor(exponent)
}

AMX inline __mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

AMX inline __m512i to_bf16(__m512 low, __m512 high) {
    const __m512bh pair = _mm512_cvtne2ps_pbh(high, low);
    __m512i result;
    std::memcpy(&result, &pair, sizeof(result));
    return result;
}

// A row of fp32 numbers times a factor to bf16.
AMX inline void store_row(const float* row, float factor, int64_t channels, bits16* out) {
    const __m512 factors = _mm512_set1_ps(factor);
    for (int64_t c = 0; c < channels; c += 32) {
        const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(row + c), factors);
        const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(row + c + 16), factors);
        _mm512_storeu_si512(out + c, to_bf16(low, high));
    }
}

}  // namespace megatron::amx

#endif
