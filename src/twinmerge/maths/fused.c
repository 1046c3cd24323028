/* Merges a range of stored checkpoint values in one pass, with the bits of the torch path (see fused.py).
 *
 * Plain C11, loaded by ctypes. A range is worked on in chunks that stay in the first-level cache; each stage is one loop
 * that the compiler vectorises. This file includes itself: the stages are compiled once for each instruction set (LEVEL)
 * and, where they depend on it, for each dtype that sums are taken in (WORK). All give the same bits.
 */

#ifndef LEVEL /* ------------------------------------------------------------------------------------- once, at the start */

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "safetensors and the random words are little-endian"
#endif

#define VERSION 9
#define BLOCK 65536      /* elements of a sum, as in sums.py */
#define CHUNK 1024       /* elements of a stage at most, a multiple of 64 */
#define LEAST 32         /* the same at least */
#define ROOM 32768       /* floats for the experts' values of a chunk */
#define MOST (ROOM / LEAST) /* experts */
#define SHARED 4         /* values that are counted apart, as in select.py */
#define MAGNITUDE 0x7FFFFFFFu
#define INFINITE 0x7F800000u
#define NEVER 0x7FFFFFFFu
#define CANCELLED 1e-8   /* a sum of weights below it is 0, as in base.py */
#define ENDLESS (INT64_C(1) << 61) /* room for all entries that there can be */

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

enum { BF16, F16, F32 };             /* codes of dtypes */
enum { LINEAR, MEAN, SUM, LARGEST, OVERLAP, FURTHEST, UNITED, NEAR }; /* how the experts' values combine */

/* Memory of a file has no alignment to rely on. */
typedef uint16_t __attribute__((aligned(1), may_alias)) stored16;
typedef uint32_t __attribute__((aligned(1), may_alias)) stored32;

typedef struct {
    int64_t experts;
    double scale, divisor;
    const double *weights;
    const uint64_t *keys;       /* two for each expert; NULL: no entry is dropped */
    const uint32_t *below;      /* an entry is kept if its draw of 24 bits is below */
    const double *factors;      /* of what is kept */
    const uint32_t *thresholds; /* NULL: no entry is trimmed */
    const int64_t *rooms;       /* how many entries equal to the threshold are kept */
    const uint32_t *cuts;       /* the same of what a trim would keep, and is cut; NULL: nothing is cut */
    const int64_t *cut_rooms;
    const double *after;        /* factors of what is left; NULL: none */
    const double *votes;
    const uint8_t *flip;        /* the experts whose side is the other one */
    const double *importances;  /* factors of the Fisher information */
    const double *floors;       /* of it */
    double divides;             /* what a mean is divided by at least; 0: by its own least weight */
    const double *marks;        /* an expert marks an entry of s where |x| > its mark times |s - x|; NULL: none marks */
    int64_t marked;             /* entries that fewer experts mark become zero */
    double step, least_step;    /* of NEAR: how far an entry goes, and what its way is divided by at least */
    int64_t select_room;        /* of the threshold below */
    int32_t selects, select;    /* whether entries are selected by their spread over the experts, and from which on */
    int32_t deltas, combine, tie;
    int32_t rounds;             /* votes are summed in float, each product rounded, whatever WORK is */
    int32_t ready;              /* 0: values are as stored; else deltas that are summed in float (1) or double (2) */
} Rule;

typedef struct {
    const void *base; /* NULL where there is none */
    const void *const *experts;
    void *out;
    const uint8_t *codes; /* of base, experts and out */
    size_t size;
    uint64_t offset;
    float *staged; /* where the experts' values go before they are combined, a row each; NULL: they are combined */
} Range;

typedef struct {
    int64_t changed, erased;
    int32_t sound, fits;
} Outcome;

/* Where the masks of a range go, and what is counted of them where the vector is not 0. */
typedef struct {
    uint8_t *const *bits;
    int64_t *counts;   /* of entries that an expert changed; that 0, 1, ... experts mark; that each expert marks */
    double *masses;    /* of each block: the sums of |x| of all experts, then of |vector| where each marks; NULL: none */
    float *rows;       /* room for the branches of all experts, where there are masses */
    double *sums;      /* and for their sums on every level */
} Masks;

/* A block is 1024 rows of 64. Folding it in half again and again adds row r and row r + 512, then r and r + 256, ...:
 * eight rows 128 apart are one branch of that tree, and the branches join like the carries of a counter. */
enum { COLUMNS = 64, ROWS = BLOCK / COLUMNS, BRANCH = 8, BRANCHES = ROWS / BRANCH, LEVELS = 8 /* 1 + log2(BRANCHES) */ };
#define AS_ROWS(x) ((float(*)[COLUMNS])(x)) /* of a branch */
enum { MASKED = ROOM / COLUMNS }; /* experts that masks are made of, at most */
enum { PANEL = 8 }; /* experts whose products with all others are summed up at once */

typedef struct {
    uint32_t changed, differing, worst;
} Counts;

INLINE float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }
INLINE size_t width_of(int code) { return code == F32 ? 4 : 2; }
INLINE const void *from(const void *memory, int code, size_t at) { return (const char *)memory + at * width_of(code); }

/* The bits of float32. Subnormal float16 numbers go through no subnormal float32: those are slow on some machines. */
INLINE uint32_t decoded(const void *memory, int code, size_t i) {
    if (code == F32)
        return ((const stored32 *)memory)[i];
    uint32_t half = ((const stored16 *)memory)[i];
    if (code == BF16)
        return half << 16;
    uint32_t rest = (half & 0x7FFF) << 13;
    uint32_t small = as_bits(as_float(rest + (113 << 23)) - 0x1p-14f);
    return (rest < 1 << 23 ? small : rest + (112 << 23)) | (half & 0x8000) << 16;
}

/* The least magnitude that is infinite, in the bits of `decoded`. */
INLINE uint32_t unsound(int code) { return code == F16 ? 0x47800000u : INFINITE; }

/* The bits of a dtype, rounded to the nearest, to the even one of two. */
INLINE uint32_t encoded(uint32_t bits, int code) {
    if (code == F32)
        return bits;
    if (code == BF16)
        return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    uint32_t size = bits & MAGNITUDE;
    uint32_t rounded = ((size + 0xFFF + (size >> 13 & 1)) >> 13) - (112 << 10);
    uint32_t small = as_bits(as_float(size) + 0.5f) - as_bits(0.5f); /* 0.5 has the steps of subnormal numbers */
    rounded = rounded > 0x7C00 ? 0x7C00 : rounded;
    return (size < 113 << 23 ? small : rounded) | (bits >> 16 & 0x8000);
}

/* The least magnitude that rounds to infinity. */
INLINE uint32_t too_large(int code) { return code == BF16 ? 0x7F7F8000u : code == F16 ? 0x477FF000u : INFINITE; }

INLINE void put(void *out, int code, size_t i, uint32_t bits) {
    if (code == F32)
        ((stored32 *)out)[i] = bits;
    else
        ((stored16 *)out)[i] = (uint16_t)bits;
}

/* One loop for each code: inside it, the code is a constant. */
#define FOR_CODE(code, call)        \
    switch (code) {                 \
    case BF16: call(BF16); break;   \
    case F16: call(F16); break;     \
    default: call(F32); break;      \
    }

__extension__ typedef unsigned __int128 uint128;

/* The upper half of x · y; in pieces where there is an instruction for many pieces at once, but none for the whole. */
INLINE uint64_t high_product(uint64_t x, uint64_t y, bool pieces) {
    if (!pieces)
        return (uint64_t)((uint128)x * y >> 64);
    uint64_t x0 = (uint32_t)x, x1 = x >> 32, y0 = (uint32_t)y, y1 = y >> 32;
    uint64_t middle = x1 * y0 + (x0 * y0 >> 32), other = x0 * y1 + (uint32_t)middle;
    return x1 * y1 + (middle >> 32) + (other >> 32);
}

/* What becomes of the entries of a row by their rank, of the least magnitude first. */
typedef struct {
    size_t length;         /* of a row */
    bool rising;           /* of equal magnitudes the first comes first, and not the last */
    const uint64_t *key;   /* of the draws; NULL: none is needed, since `below` says all or nothing */
    const uint32_t *below; /* an entry is kept if its draw of 24 bits is below */
    const double *factors; /* of what is kept; NULL: all are 1 */
} Ranks;

/* Room to sort a row: its entries twice, and their draws. */
typedef struct {
    uint64_t *entries, *other;
    uint32_t *draws;
} Sorting;

enum { SHORT = 32, MIDDLE = 1024 }; /* what is shorter is sorted by insertion, or by 8 bits at once, not 11 */
enum { OCTAVES = 8, FINEST = 9, MOST_CROWDED = 255 }; /* of magnitudes with buckets of their own, 2^FINEST each at most */

/* Few entries, or entries almost in order. */
INLINE void inserted(uint64_t *x, size_t n) {
    for (size_t i = 1; i < n; i++) {
        uint64_t one = x[i];
        size_t j = i;
        for (; j && x[j - 1] > one; j--)
            x[j] = x[j - 1];
        x[j] = one;
    }
}

/* Distinct entries in order, whose lower 32 bits are in order already; returns where they are. */
static uint64_t *by_digits(uint64_t *x, uint64_t *other, size_t n) {
    const int bits = n < MIDDLE ? 8 : 11, digits = (31 + bits - 1) / bits;
    const uint64_t mask = (1u << bits) - 1;
    uint32_t counts[4][2048];
    for (int d = 0; d < digits; d++)
        memset(counts[d], 0, sizeof(uint32_t) << bits);
    for (size_t i = 0; i < n; i++)
        for (int d = 0; d < digits; d++)
            counts[d][x[i] >> (32 + d * bits) & mask]++;
    for (int d = 0; d < digits; d++) {
        int shift = 32 + d * bits;
        if (counts[d][x[0] >> shift & mask] == n) /* all have this digit, as the low ones of 16-bit models do */
            continue;
        uint32_t at = 0;
        for (uint64_t digit = 0; digit <= mask; digit++) {
            uint32_t count = counts[d][digit];
            counts[d][digit] = at;
            at += count;
        }
        for (size_t i = 0; i < n; i++)
            other[counts[d][x[i] >> shift & mask]++] = x[i];
        uint64_t *swap = x;
        x = other, other = swap;
    }
    return x;
}

/* Sums on every level, `width` of them: what waits joins its partner, now that branch `number` is in. Returns how many wait. */
INLINE int joined(double *sums, size_t width, int waiting, size_t number) {
    for (size_t carry = number; carry & 1; carry /= 2, waiting--)
        for (size_t i = 0; i < width; i++)
            sums[(waiting - 1) * width + i] += sums[waiting * width + i];
    return waiting;
}

/* A sum of COLUMNS by folding them in half. */
INLINE double folded(double *sum) {
    for (int half = COLUMNS / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            sum[i] += sum[i + half];
    return sum[0];
}

/* The first row of a branch: its number's bits in reverse. */
INLINE size_t first_row(size_t number) {
    size_t row = 0;
    for (size_t bit = 1; bit < BRANCHES; bit *= 2)
        row = row * 2 + (number & bit ? 1 : 0);
    return row;
}

typedef struct {
    void (*merge[2])(const Rule *, const Range *, Outcome *); /* sums in float, in double */
    void (*masks[2])(const Rule *, const Range *, const Masks *, Outcome *);
    void (*weigh)(const Rule *, const Range *, const void *const *, Outcome *);
    void (*gram)(const Range *, size_t, size_t, float *, double *, double *);
    void (*norms)(const void *, int, const void *, int, size_t, const uint64_t *, uint32_t, uint64_t, double *);
    size_t (*bracket)(const void *, int, const void *, int, size_t, int32_t, uint32_t, const int32_t *, int64_t *, int32_t *);
    void (*spread)(const float *, size_t, int64_t, size_t, float *);
    bool (*ranked)(const void *, int, const void *, int, size_t, uint64_t, const Ranks *, float *, Sorting);
    bool (*copy)(const void *, int, size_t, void *);
} Level;

#define LANES 1 /* blocks of random words at once */
#define LEVEL plain
#define TARGET
#include "fused.c"
#undef LEVEL
#undef TARGET

#if defined(__x86_64__)
#define LEVEL avx2
#define TARGET __attribute__((target("avx2,fma,bmi,bmi2")))
#include "fused.c"
#undef LEVEL
#undef TARGET
#undef LANES
#define LANES 32
#define LEVEL avx512
#if defined(__clang__)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2")))
#else
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,prefer-vector-width=512")))
#endif
#include "fused.c"
#undef LEVEL
#undef TARGET
#endif

#elif !defined(WORK) /* ------------------------------------------------------------------------- for each instruction set */

#define NAME(stage) JOIN(stage, LEVEL)

INLINE uint32_t NAME(load_loop)(const void *memory, int code, const float *restrict base, size_t n, float *restrict x) {
    uint32_t worst = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = decoded(memory, code, i), size = bits & MAGNITUDE;
        worst = size > worst ? size : worst;
        x[i] = base ? as_float(bits) - base[i] : as_float(bits);
    }
    return worst;
}

/* x = the stored values, less the base's where there is a base; false if one is NaN or infinite. */
static TARGET bool NAME(load)(const void *memory, int code, const float *base, size_t n, float *x) {
    uint32_t worst;
#define CALL(c) worst = base ? NAME(load_loop)(memory, c, base, n, x) : NAME(load_loop)(memory, c, NULL, n, x)
    FOR_CODE(code, CALL)
#undef CALL
    return worst < unsound(code);
}

/* x = |stored - base| of a chunk. */
INLINE void NAME(size_of)(const void *x, int code, const void *base, int of_base, size_t at, size_t n, float *to) {
    float theirs[CHUNK];
    if (base)
        NAME(load)(from(base, of_base, at), of_base, NULL, n, theirs);
    NAME(load)(from(x, code, at), code, base ? theirs : NULL, n, to);
}

/* Words of Philox4x64-10: blocks of four from the `first` on, a multiple of LANES of them at least. NumPy counts before it
 * draws, so that block 0 is counter 1. */
static TARGET void NAME(random_words)(const uint64_t *key, uint64_t first, size_t blocks, uint64_t *restrict words) {
    for (size_t block = 0; block < blocks; block += LANES, words += 4 * LANES) {
        uint64_t a[LANES], b[LANES] = {0}, c[LANES] = {0}, d[LANES] = {0}, k0 = key[0], k1 = key[1];
        for (int i = 0; i < LANES; i++)
            a[i] = first + block + i + 1;
        for (int round = 0; round < 10; round++, k0 += 0x9E3779B97F4A7C15, k1 += 0xBB67AE8584CAA73B)
            for (int i = 0; i < LANES; i++) {
                uint64_t left = high_product(a[i], 0xD2E7470EE14C6C93, LANES > 1), low = a[i] * 0xD2E7470EE14C6C93;
                uint64_t right = high_product(c[i], 0xCA5A826395121157, LANES > 1);
                a[i] = right ^ b[i] ^ k0;
                b[i] = c[i] * 0xCA5A826395121157;
                c[i] = left ^ d[i] ^ k1;
                d[i] = low;
            }
        for (int i = 0; i < LANES; i++) {
            words[4 * i] = a[i], words[4 * i + 1] = b[i];
            words[4 * i + 2] = c[i], words[4 * i + 3] = d[i];
        }
    }
}

/* Entries of x whose draw is not below the limit become zero. `at`: index of the first in its tensor. */
static TARGET void NAME(drop)(float *restrict x, size_t n, const uint64_t *key, uint32_t below, uint64_t at) {
    uint64_t words[CHUNK / 2 + 4 * LANES]; /* a chunk may begin inside a block */
    size_t skip = at % 8, blocks = (skip + n + 7) / 8;
    NAME(random_words)(key, at / 8, blocks, words);
    const stored32 *draws = (const stored32 *)words + skip;
    for (size_t i = 0; i < n; i++)
        x[i] = as_float((draws[i] >> 8) < below ? as_bits(x[i]) : 0);
}

/* Entries below the threshold become zero, and those equal to it but for the first `room`; returns what room is left. */
static TARGET int64_t NAME(trim)(float *restrict x, size_t n, uint32_t threshold, int64_t room) {
    uint32_t equal = 0;
    if (room > 0 && room < ENDLESS)
        for (size_t i = 0; i < n; i++)
            equal += (as_bits(x[i]) & MAGNITUDE) == threshold;
    if (equal > room && room > 0) {
        for (size_t i = 0; i < n; i++) {
            uint32_t size = as_bits(x[i]) & MAGNITUDE;
            bool kept = size > threshold || (size == threshold && room-- > 0);
            x[i] = kept ? x[i] : 0;
        }
        return 0;
    }
    int32_t above = (int32_t)threshold - (room > 0); /* -1: zeros, too, stay as they are */
    for (size_t i = 0; i < n; i++)
        x[i] = (int32_t)(as_bits(x[i]) & MAGNITUDE) > above ? x[i] : 0;
    return room - equal;
}

/* Entries above the threshold become zero, and the first `room` equal to it; returns what room is left. */
static TARGET int64_t NAME(cut)(float *restrict x, size_t n, uint32_t threshold, int64_t room) {
    uint32_t equal = 0;
    if (room > 0 && room < ENDLESS)
        for (size_t i = 0; i < n; i++)
            equal += (as_bits(x[i]) & MAGNITUDE) == threshold;
    if (equal > room && room > 0) {
        for (size_t i = 0; i < n; i++) {
            uint32_t size = as_bits(x[i]) & MAGNITUDE;
            bool gone = size > threshold || (size == threshold && room-- > 0);
            x[i] = gone ? 0 : x[i];
        }
        return 0;
    }
    int32_t above = (int32_t)threshold - (room > 0);
    for (size_t i = 0; i < n; i++)
        x[i] = (int32_t)(as_bits(x[i]) & MAGNITUDE) > above ? 0 : x[i];
    return room - equal;
}

/* The standard deviation over the experts, entry by entry, out of rows of x. */
static TARGET void NAME(spread)(const float *x, size_t stride, int64_t experts, size_t n, float *restrict to) {
    double mean[CHUNK], sum[CHUNK];
    memset(mean, 0, sizeof mean);
    memset(sum, 0, sizeof sum);
    for (int64_t e = 0; e < experts; e++)
        for (size_t i = 0; i < n; i++)
            mean[i] += x[e * stride + i];
    for (size_t i = 0; i < n; i++)
        mean[i] /= (double)experts;
    for (int64_t e = 0; e < experts; e++)
        for (size_t i = 0; i < n; i++) {
            double away = x[e * stride + i] - mean[i];
            sum[i] += away * away;
        }
    for (size_t i = 0; i < n; i++)
        to[i] = (float)sqrt(sum[i] / (double)experts);
}

/* All experts' entries become zero where `trim` leaves nothing of their spread; returns what room is left. */
static TARGET int64_t NAME(pick)(float *x, size_t stride, int64_t experts, size_t n, uint32_t threshold, int64_t room) {
    float spread[CHUNK];
    NAME(spread)(x, stride, experts, n, spread);
    room = NAME(trim)(spread, n, threshold, room);
    for (int64_t e = 0; e < experts; e++) {
        float *row = x + e * stride;
        for (size_t i = 0; i < n; i++)
            row[i] = spread[i] != 0 ? row[i] : 0;
    }
    return room;
}

/* The entries of a row by their magnitude, as magnitude << 32 | index. Of equal ones the first comes first; with `back` the last
 * does, and indices count from the end. Buckets bring all in order but what shares one: that is of one magnitude in most changes
 * of 16-bit models, and few entries otherwise. */
static TARGET const uint64_t *NAME(sorted)(const float *restrict x, size_t n, bool back, Sorting room) {
    uint64_t *order = room.other;
    if (n < SHORT) {
        for (size_t i = 0; i < n; i++)
            order[i] = (uint64_t)(as_bits(x[back ? n - 1 - i : i]) & MAGNITUDE) << 32 | i;
        inserted(order, n);
        return order;
    }
    uint32_t starts[(OCTAVES << FINEST) + 1], top = 0;
    uint16_t *own = (uint16_t *)room.entries;
    int parts = 2; /* of an octave, as a power of 2 */
    while (parts < FINEST && (size_t)OCTAVES << parts < n)
        parts++;
    for (size_t i = 0; i < n; i++) {
        uint32_t size = as_bits(x[i]) & MAGNITUDE;
        top = size > top ? size : top;
    }
    const int shift = 23 - parts;
    const int32_t buckets = (OCTAVES << parts) + 1, below = (int32_t)(top >> shift) - buckets + 1;
    for (size_t i = 0; i < n; i++) { /* zeros are in the first, and all below the first octave in the second */
        uint32_t size = as_bits(x[i]) & MAGNITUDE;
        int32_t bucket = (int32_t)(size >> shift) - below;
        bucket = bucket < 1 ? 1 : bucket;
        own[i] = (uint16_t)(size == 0 ? 0 : bucket);
    }
    memset(starts, 0, sizeof *starts * (size_t)buckets);
    for (size_t i = 0; i < n; i++)
        starts[own[i]]++;
    size_t many = 0;
    uint16_t crowded[1 + MOST_CROWDED];
    uint32_t at = 0;
    for (int32_t bucket = 0; bucket < buckets; bucket++) {
        uint32_t count = starts[bucket];
        crowded[many] = (uint16_t)bucket;
        many += count >= SHORT && many < MOST_CROWDED;
        starts[bucket] = at;
        at += count;
    }
    for (size_t i = 0; i < n; i++) {
        size_t from_start = back ? n - 1 - i : i;
        order[starts[own[from_start]]++] = (uint64_t)(as_bits(x[from_start]) & MAGNITUDE) << 32 | i;
    }
    if (many == MOST_CROWDED)
        return by_digits(order, room.entries, n);
    for (size_t c = 0; c < many; c++) {
        uint32_t begin = crowded[c] ? starts[crowded[c] - 1] : 0, count = starts[crowded[c]] - begin;
        uint64_t *those = order + begin, unlike = 0;
        for (size_t i = 1; i < count; i++)
            unlike |= those[i] ^ those[0];
        const uint64_t *done = unlike >> 32 ? by_digits(those, room.entries, count) : those;
        if (done != those)
            memcpy(those, done, count * sizeof *those);
    }
    inserted(order, n);
    return order;
}

/* What is left of a row in this order. */
static TARGET void NAME(leave)(float *restrict x, const Ranks *ranks, const uint64_t *restrict order, const uint32_t *restrict draws) {
    size_t n = ranks->length;
    for (size_t r = 0; r < n; r++) {
        size_t i = ranks->rising ? (uint32_t)order[r] : n - 1 - (uint32_t)order[r];
        uint32_t kept = ranks->key ? draws[i] < ranks->below[r] : ranks->below[r] > 0;
        float left = ranks->factors ? (float)(x[i] * ranks->factors[r]) : x[i];
        x[i] = as_float(as_bits(left) & -kept); /* a coin is no branch to predict */
    }
}

/* Whole rows of stored - base. An entry of rank r stays if its draw is below[r], times factors[r]; the rest becomes zero.
 * `at`: index of the first in its tensor; false: one is NaN or infinite. */
static TARGET bool NAME(ranked)(const void *stored, int code, const void *base, int of_base, size_t size, uint64_t at,
                                const Ranks *ranks, float *out, Sorting room) {
    bool sound = true;
    float theirs[CHUNK];
    size_t length = ranks->length;
    for (size_t row = 0; row < size; row += length) {
        float *x = out + row;
        for (size_t i = 0, n; i < length; i += n) {
            n = least(CHUNK, length - i);
            if (base)
                sound &= NAME(load)(from(base, of_base, row + i), of_base, NULL, n, theirs);
            sound &= NAME(load)(from(stored, code, row + i), code, base ? theirs : NULL, n, x + i);
            if (ranks->key) {
                uint64_t words[CHUNK / 2 + 4 * LANES], first = at + row + i;
                size_t skip = first % 8, blocks = (skip + n + 7) / 8;
                NAME(random_words)(ranks->key, first / 8, blocks, words);
                const stored32 *draws = (const stored32 *)words + skip;
                for (size_t j = 0; j < n; j++)
                    room.draws[i + j] = draws[j] >> 8;
            }
        }
        NAME(leave)(x, ranks, NAME(sorted)(x, length, !ranks->rising, room), room.draws);
    }
    return sound;
}

/* The bytes as they are; false if a value is NaN or infinite. */
static TARGET bool NAME(copy)(const void *stored, int code, size_t n, void *to) {
    if (code == F32) {
        const stored32 *restrict x = stored;
        stored32 *restrict out = to;
        uint32_t worst = 0;
        for (size_t i = 0; i < n; i++) {
            uint32_t size = x[i] & MAGNITUDE;
            worst = size > worst ? size : worst;
            out[i] = x[i];
        }
        return worst < INFINITE;
    }
    const stored16 *restrict x = stored;
    stored16 *restrict out = to;
    int16_t worst = 0;
    for (size_t i = 0; i < n; i++) {
        int16_t size = (int16_t)(x[i] & 0x7FFF);
        worst = size > worst ? size : worst;
        out[i] = x[i];
    }
    return worst < (code == F16 ? 0x7C00 : (int)(INFINITE >> 16));
}

INLINE Counts NAME(round_loop)(const float *restrict x, const float *restrict base, size_t n, void *restrict out, int code) {
    uint32_t changed = 0, differing = 0, worst = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = as_bits(x[i]), size = bits & MAGNITUDE, rounded = encoded(bits, code);
        worst = size > worst ? size : worst;
        put(out, code, i, rounded);
        if (base) {
            uint32_t old = as_bits(base[i]);
            changed += bits != old;
            differing += rounded != encoded(old, code);
        }
    }
    return (Counts){changed, differing, worst};
}

/* Round to the output's dtype; count what differs from the base, and what no longer does once it is rounded. */
static TARGET void NAME(round)(const float *x, const float *base, size_t n, void *out, int code, Outcome *outcome) {
    Counts counts;
#define CALL(c) counts = base ? NAME(round_loop)(x, base, n, out, c) : NAME(round_loop)(x, NULL, n, out, c)
    FOR_CODE(code, CALL)
#undef CALL
    outcome->changed += counts.changed;
    outcome->erased += counts.changed - counts.differing;
    outcome->fits &= counts.worst < too_large(code);
}

INLINE uint32_t NAME(branch_loop)(const void *x, int code, const float (*base)[COLUMNS], size_t row, float to[BRANCH][COLUMNS]) {
    uint32_t worst = 0;
    for (size_t r = 0; r < BRANCH; r++) {
        const void *there = from(x, code, (row + r * BRANCHES) * COLUMNS);
        uint32_t found = NAME(load_loop)(there, code, base ? base[r] : NULL, COLUMNS, to[r]);
        worst = found > worst ? found : worst;
    }
    return worst;
}

/* Rows `row`, `row` + 128, ... of a block of n elements, less the base's where there is a base; zeros beyond its end; false if one
 * is NaN or infinite. */
INLINE bool NAME(branch)(const void *x, int code, const float (*base)[COLUMNS], size_t n, size_t row, float to[BRANCH][COLUMNS]) {
    bool sound = true;
    if ((row + (BRANCH - 1) * BRANCHES + 1) * COLUMNS <= n) { /* all of it is there */
        uint32_t worst;
#define CALL(c) worst = base ? NAME(branch_loop)(x, c, base, row, to) : NAME(branch_loop)(x, c, NULL, row, to)
        FOR_CODE(code, CALL)
#undef CALL
        return worst < unsound(code);
    }
    for (size_t r = 0; r < BRANCH; r++) {
        size_t at = (row + r * BRANCHES) * COLUMNS, here = at < n ? least(n - at, COLUMNS) : 0;
        const float *theirs = base ? base[r] : NULL;
        if (here == COLUMNS) {
            sound &= NAME(load)(from(x, code, at), code, theirs, COLUMNS, to[r]);
            continue;
        }
        memset(to[r], 0, sizeof to[r]);
        sound &= NAME(load)(from(x, code, at), code, theirs, here, to[r]);
    }
    return sound;
}

/* The sums of |x| over a branch, column by column. */
INLINE void NAME(branch_size)(const float x[BRANCH][COLUMNS], double *restrict to) {
    for (int i = 0; i < COLUMNS; i++) {
        double p[BRANCH];
        for (int r = 0; r < BRANCH; r++)
            p[r] = (double)as_float(as_bits(x[r][i]) & MAGNITUDE);
        to[i] = ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7]));
    }
}

/* Flags of 0 and 1 as bits: entry 8 b + j is bit j of byte b. */
INLINE void NAME(pack)(const uint8_t *flags, size_t words, uint64_t *restrict to) {
    for (size_t w = 0; w < words; w++) {
        uint64_t word = 0;
        for (int b = 0; b < 8; b++) {
            uint64_t eight;
            memcpy(&eight, flags + 64 * w + 8 * b, 8);
            word |= (eight * 0x0102040810204080 >> 56) << 8 * b;
        }
        to[w] = word;
    }
}

/* Counts what `words` of every expert mark, rows of `count`, among the entries of `some`. */
static TARGET void NAME(tally)(const uint64_t *words, size_t count, int64_t experts, const uint64_t *some, int64_t *by_count) {
    int64_t *by_task = by_count + experts + 1;
    for (size_t w = 0; w < count; w++) {
        uint64_t planes[16] = {0}; /* bit p of how many experts mark an entry */
        int depth = 0;
        for (int64_t e = 0; e < experts; e++) {
            uint64_t carry = words[e * count + w] & some[w];
            by_task[e] += __builtin_popcountll(carry);
            for (int p = 0; carry; p++) {
                uint64_t both = planes[p] & carry;
                planes[p] ^= carry;
                carry = both;
                depth = p >= depth ? p + 1 : depth;
            }
        }
        for (int64_t times = 0; times <= experts && times >> depth == 0; times++) {
            uint64_t those = some[w];
            for (int p = 0; p < depth; p++)
                those &= times >> p & 1 ? planes[p] : ~planes[p];
            by_count[times] += __builtin_popcountll(those);
        }
    }
}

#define WORK float
#define KIND f
#define FMA fmaf
#include "fused.c"
#undef WORK
#undef KIND
#undef FMA
#define WORK double
#define KIND d
#define FMA fma
#include "fused.c"
#undef WORK
#undef KIND
#undef FMA

/* share = factor · max(F, floor), and the sums of share · x and of share; the greatest of F's bits, as a number without sign:
 * what is negative has more than infinity. */
INLINE uint32_t NAME(shares)(const void *fisher, const float *restrict x, size_t n, double factor, double least_fisher,
                             double *restrict total, double *restrict mass) {
    uint32_t worst = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = ((const stored32 *)fisher)[i];
        worst = bits > worst ? bits : worst;
        double f = as_float(bits), share = (f < least_fisher ? least_fisher : f) * factor;
        total[i] += share * x[i];
        mass[i] += share;
    }
    return worst;
}

/* Fisher-weighted averaging; where nothing has any weight, the plain weighted mean, or of deltas the base. */
static TARGET void NAME(weigh)(const Rule *rule, const Range *range, const void *const *fisher, Outcome *outcome) {
    double total[CHUNK], mass[CHUNK];
    float x[CHUNK], merged[CHUNK], base[CHUNK];
    const float *known = rule->deltas ? base : NULL;
    const uint8_t *codes = range->codes + 1;
    int out = codes[rule->experts];
    for (size_t at = 0, n; at < range->size; at += n) {
        n = least(CHUNK, range->size - at);
        if (known)
            outcome->sound &= NAME(load)(from(range->base, range->codes[0], at), range->codes[0], NULL, n, base);
        memset(total, 0, sizeof total);
        memset(mass, 0, sizeof mass);
        for (int64_t e = 0; e < rule->experts; e++) {
            int code = codes[e];
            outcome->sound &= NAME(load)(from(range->experts[e], code, at), code, known, n, x);
            uint32_t worst = NAME(shares)(from(fisher[e], F32, at), x, n, rule->importances[e], rule->floors[e], total, mass);
            outcome->sound &= worst < INFINITE;
        }
        if (known) {
            for (size_t i = 0; i < n; i++)
                total[i] = mass[i] > 0 ? total[i] / mass[i] : 0;
            NAME(move_d)(total, base, n, rule->scale, merged);
            NAME(round)(merged, known, n, (void *)from(range->out, out, at), out, outcome);
            continue;
        }
        uint32_t none = 0;
        for (size_t i = 0; i < n; i++) {
            none += !(mass[i] > 0);
            merged[i] = (float)(total[i] / mass[i]);
        }
        if (none) {
            memset(total, 0, sizeof total);
            for (int64_t e = 0; e < rule->experts; e++) {
                int code = codes[e];
                NAME(load)(from(range->experts[e], code, at), code, NULL, n, x);
                for (size_t i = 0; i < n; i++)
                    total[i] += rule->weights[e] * x[i];
            }
            for (size_t i = 0; i < n; i++)
                merged[i] = mass[i] > 0 ? merged[i] : (float)(total[i] / rule->divisor);
        }
        NAME(round)(merged, NULL, n, (void *)from(range->out, out, at), out, outcome);
    }
}

INLINE void NAME(products)(const float a[BRANCH][COLUMNS], const float b[BRANCH][COLUMNS], double *restrict to) {
    for (int i = 0; i < COLUMNS; i++) {
        double p[BRANCH];
        for (int r = 0; r < BRANCH; r++)
            p[r] = (double)a[r][i] * (double)b[r][i];
        to[i] = ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7]));
    }
}

/* <x_i, x_j>, i <= j, row by row, of the block of n elements from `at` on; x = stored - base where there is a base.
 * rows, sums: room for the branches of all experts, and for the sums of a panel on every level. */
static TARGET void NAME(gram)(const Range *range, size_t count, size_t at, float *rows, double *sums, double *found) {
    size_t n = least(BLOCK, range->size - at);
    const uint8_t *codes = range->codes;
    float(*x)[BRANCH][COLUMNS] = (float(*)[BRANCH][COLUMNS])rows, base[BRANCH][COLUMNS];
    for (size_t first = 0; first < count; first += PANEL) {
        size_t last = least(first + PANEL, count), pairs = 0;
        for (size_t i = first; i < last; i++)
            pairs += count - i;
        size_t width = pairs * COLUMNS;
        int waiting = 0;
        for (size_t number = 0; number < BRANCHES; number++, waiting++) {
            size_t row = first_row(number);
            if (range->base)
                NAME(branch)(from(range->base, codes[0], at), codes[0], NULL, n, row, base);
            for (size_t e = first; e < count; e++)
                NAME(branch)(from(range->experts[e], codes[e + 1], at), codes[e + 1], range->base ? base : NULL, n, row, x[e]);
            double *to = sums + waiting * width;
            for (size_t i = first; i < last; i++)
                for (size_t j = i; j < count; j++, to += COLUMNS)
                    NAME(products)(x[i], x[j], to);
            waiting = joined(sums, width, waiting, number);
        }
        for (double *sum = sums; sum < sums + width; sum += COLUMNS, found++)
            *found = folded(sum);
    }
}

/* The sum of |x| over one block of n elements. */
static TARGET double NAME(block_size)(const float *x, size_t n) {
    double sums[LEVELS][COLUMNS]; /* branches that wait for their partner, and the newest */
    float rows[BRANCH][COLUMNS];
    int waiting = 0;
    for (size_t number = 0; number < BRANCHES; number++, waiting++) {
        NAME(branch)(x, F32, NULL, n, first_row(number), rows);
        NAME(branch_size)(rows, sums[waiting]);
        waiting = joined(sums[0], COLUMNS, waiting, number);
    }
    return folded(sums[0]);
}

/* The sums of |x - base| over one block, of all entries and of those that `drop` keeps. */
static TARGET void NAME(norms)(const void *stored, int code, const void *base, int of_base, size_t n, const uint64_t *key,
                               uint32_t below, uint64_t offset, double *found) {
    float x[BLOCK], theirs[CHUNK];
    x[0] = 0; /* n is at least 1 */
    for (size_t at = 0, m; at < n; at += m) {
        m = least(CHUNK, n - at);
        if (base)
            NAME(load)(from(base, of_base, at), of_base, NULL, m, theirs);
        NAME(load)(from(stored, code, at), code, base ? theirs : NULL, m, x + at);
    }
    found[1] = found[0] = NAME(block_size)(x, n);
    if (below >= 1 << 24)
        return;
    for (size_t at = 0, m; at < n; at += m) {
        m = least(CHUNK, n - at);
        NAME(drop)(x + at, m, key, below, offset + at);
    }
    found[1] = NAME(block_size)(x, n);
}

/* Counts of |x - base| above low + width - 1 and equal to low + shared[...]; the others from low on, less low, are listed. */
static TARGET size_t NAME(bracket)(const void *x, int code, const void *base, int of_base, size_t size, int32_t low, uint32_t width,
                                   const int32_t *shared, int64_t *counts, int32_t *inside) {
    float sizes[CHUNK];
    int32_t offsets[CHUNK];
    uint8_t flags[CHUNK + 64];
    int32_t end = (int32_t)(width < NEVER ? width : NEVER);
    size_t found = 0;
    for (size_t at = 0, n; at < size; at += n) {
        n = least(CHUNK, size - at);
        NAME(size_of)(x, code, base, of_base, at, n, sizes);
        uint32_t above = 0;
        for (size_t i = 0; i < n; i++) {
            int32_t offset = (int32_t)(as_bits(sizes[i]) & MAGNITUDE) - low;
            offsets[i] = offset;
            above += offset >= end;
            flags[i] = (uint32_t)offset < width;
        }
        counts[0] += above;
        for (int k = 0; k < SHARED; k++) { /* of those that are none, no offset is one */
            uint32_t same = 0;
            int32_t value = shared[k];
            for (size_t i = 0; value >= 0 && i < n; i++) {
                uint8_t equal = offsets[i] == value;
                same += equal;
                flags[i] &= equal ^ 1;
            }
            counts[1 + k] += same;
        }
        memset(flags + n, 0, 64);
        for (size_t i = 0; i < n; i += 64) { /* few are inside, mostly */
            uint64_t some[8], any = 0;
            memcpy(some, flags + i, 64);
            for (int k = 0; k < 8; k++)
                any |= some[k];
            for (size_t k = 0; any && k < 8; k++)
                for (; some[k]; some[k] &= some[k] - 1)
                    inside[found++] = offsets[i + 8 * k + (size_t)__builtin_ctzll(some[k]) / 8];
        }
    }
    return found;
}

static const Level NAME(level) = {
    {NAME(merge_f), NAME(merge_d)}, {NAME(masks_f), NAME(masks_d)}, NAME(weigh), NAME(gram), NAME(norms), NAME(bracket), NAME(spread), NAME(ranked), NAME(copy),
};

#undef NAME

#else /* ------------------------------------------------------------------ for each instruction set and dtype of the sums */

#define OF(stage) JOIN(NAME_(stage, KIND), LEVEL)
#define NAME_(a, b) JOIN(a, b)

INLINE uint32_t OF(add_loop)(const void *memory, int code, const float *restrict base, size_t n, bool first, WORK weight,
                             WORK *restrict sum) {
    uint32_t worst = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = decoded(memory, code, i), size = bits & MAGNITUDE;
        worst = size > worst ? size : worst;
        WORK x = base ? as_float(bits) - base[i] : as_float(bits);
        sum[i] = first ? x * weight : FMA(x, weight, sum[i]);
    }
    return worst;
}

/* sum += weight · (stored - base); false if a stored value is NaN or infinite. */
static TARGET bool OF(add)(const void *memory, int code, const float *base, size_t n, bool first, double weight, WORK *sum) {
    uint32_t worst;
    WORK w = (WORK)weight;
#define CALL(c)                                                                                                       \
    worst = base ? first ? OF(add_loop)(memory, c, base, n, true, w, sum) : OF(add_loop)(memory, c, base, n, false, w, sum) \
                 : first ? OF(add_loop)(memory, c, NULL, n, true, w, sum) : OF(add_loop)(memory, c, NULL, n, false, w, sum)
    FOR_CODE(code, CALL)
#undef CALL
    return worst < unsound(code);
}

static TARGET void OF(rescale)(float *restrict x, size_t n, double by) {
    WORK factor = (WORK)by;
    for (size_t i = 0; i < n; i++)
        x[i] = (float)(x[i] * factor);
}

static TARGET void OF(signs)(const WORK *restrict sum, size_t n, int tie, float *restrict sign) {
    float even = (float)tie;
    for (size_t i = 0; i < n; i++) {
        float s = (float)(sum[i] > 0) - (float)(sum[i] < 0);
        sign[i] = sum[i] != sum[i] ? NAN : s == 0 ? even : s; /* 0 · infinity has no sign, as in torch */
    }
}

INLINE void OF(agree_loop)(const float *restrict x, const float *restrict sign, size_t n, int combine, float side, WORK weight,
                           WORK *restrict total, WORK *restrict mass) {
    WORK by = combine == LARGEST ? (weight < 0 ? -weight : weight) : weight * side;
    for (size_t i = 0; i < n; i++) {
        float signed_size = x[i] * sign[i] * side, size = 0 > signed_size ? 0 : signed_size; /* NaN stays NaN */
        if (combine == LARGEST) {
            WORK value = size * by;
            total[i] = value > total[i] || value != value ? value : total[i];
        } else
            total[i] = FMA((WORK)size, by, total[i]);
        if (combine == MEAN)
            mass[i] += size > 0 ? weight : 0;
    }
}

/* Over the entries of one expert that have the elected sign: the sum (or the largest) of weight · size, and of weight. */
static TARGET void OF(agree)(const float *x, const float *sign, size_t n, int combine, bool flip, double weight, WORK *total,
                             WORK *mass) {
    float side = flip ? -1 : 1;
    WORK w = (WORK)weight;
    if (combine == MEAN)
        OF(agree_loop)(x, sign, n, MEAN, side, w, total, mass);
    else if (combine == SUM)
        OF(agree_loop)(x, sign, n, SUM, side, w, total, mass);
    else
        OF(agree_loop)(x, sign, n, LARGEST, side, w, total, mass);
}

static TARGET void OF(means)(WORK *restrict total, const WORK *restrict mass, size_t n, double at_least) {
    WORK bound = (WORK)at_least;
    if (at_least > 0) /* no entry agrees: 0 / its bound is the 0 that is wanted */
        for (size_t i = 0; i < n; i++)
            total[i] /= mass[i] < bound ? bound : mass[i];
    else
        for (size_t i = 0; i < n; i++) {
            int some = at_least < 0 ? mass[i] >= (WORK)CANCELLED || mass[i] <= -(WORK)CANCELLED : mass[i] != 0;
            WORK mean = total[i] / (some ? mass[i] : 1);
            total[i] = some ? mean : 0;
        }
}

static TARGET void OF(apply_signs)(WORK *restrict total, const float *restrict sign, size_t n) {
    for (size_t i = 0; i < n; i++)
        total[i] *= sign[i];
}

/* sum = weight · x, or sum += weight · x: float32 with each product rounded. */
static TARGET void OF(vote)(const float *restrict x, size_t n, bool first, float weight, WORK *restrict sum) {
    for (size_t i = 0; i < n; i++) {
        float product = x[i] * weight;
        sum[i] = first ? product : (float)sum[i] + product;
    }
}

/* The change of TIES, out of the experts' values x, rows of n. */
static TARGET void OF(elect)(const Rule *rule, const float *x, size_t n, double least_weight, WORK *total) {
    WORK mass[CHUNK];
    float sign[CHUNK];
    for (int64_t e = 0; e < rule->experts; e++)
        if (rule->rounds)
            OF(vote)(x + e * n, n, e == 0, (float)rule->votes[e], total);
        else
            OF(add)(x + e * n, F32, NULL, n, e == 0, rule->votes[e], total);
    OF(signs)(total, n, rule->tie, sign);
    memset(total, 0, n * sizeof *total);
    memset(mass, 0, n * sizeof *mass);
    for (int64_t e = 0; e < rule->experts; e++)
        OF(agree)(x + e * n, sign, n, rule->combine, rule->flip[e], rule->weights[e], total, mass);
    if (rule->combine == MEAN)
        OF(means)(total, mass, n, rule->divides > 0 ? rule->divides : least_weight);
    OF(apply_signs)(total, sign, n);
}

/* The mean of what is not 0 where that is of several experts; of one alone, its weight times it. */
static TARGET void OF(overlap)(const Rule *rule, const float *x, size_t n, WORK *total) {
    WORK own[CHUNK], count[CHUNK];
    memset(count, 0, n * sizeof *count);
    for (int64_t e = 0; e < rule->experts; e++) {
        OF(add)(x + e * n, F32, NULL, n, e == 0, 1, total);
        OF(add)(x + e * n, F32, NULL, n, e == 0, rule->weights[e], own);
        for (size_t i = 0; i < n; i++)
            count[i] += x[e * n + i] != 0;
    }
    for (size_t i = 0; i < n; i++) {
        WORK mean = total[i] / (count[i] > 0 ? count[i] : 1);
        total[i] = count[i] > 1 ? mean : own[i];
    }
}

/* base + scale · change; the base's own bits, -0.0 too, where nothing changes. */
static TARGET void OF(move)(const WORK *restrict change, const float *restrict base, size_t n, double scale, float *restrict to) {
    WORK by = (WORK)scale;
    bool still = scale == 0;
    for (size_t i = 0; i < n; i++) {
        float there = (float)FMA(change[i], by, (WORK)base[i]);
        to[i] = (still | (change[i] == 0)) ? base[i] : there;
    }
}

static TARGET void OF(divide)(const WORK *restrict sum, size_t n, double divisor, float *restrict to) {
    WORK by = (WORK)divisor;
    for (size_t i = 0; i < n; i++)
        to[i] = (float)(sum[i] / by);
}

/* What becomes of the values of one expert by itself; false if one is NaN or infinite. left: room at its thresholds. */
static TARGET bool OF(stage)(const Rule *rule, int64_t e, const void *stored, int code, const float *base, size_t n, uint64_t at,
                             int64_t left[2], float *x) {
    bool sound = NAME(load)(stored, code, base, n, x);
    if (rule->keys) {
        if (rule->below[e] < 1 << 24)
            NAME(drop)(x, n, rule->keys + 2 * e, rule->below[e], at);
        if (rule->factors[e] != 1)
            OF(rescale)(x, n, rule->factors[e]);
    }
    if (rule->thresholds)
        left[0] = NAME(trim)(x, n, rule->thresholds[e], left[0]);
    if (rule->cuts)
        left[1] = NAME(cut)(x, n, rule->cuts[e], left[1]);
    if (rule->after && rule->after[e] != 1)
        OF(rescale)(x, n, rule->after[e]);
    return sound;
}

/* Of every entry the value that is furthest from 0, of equal ones the last. */
static TARGET void OF(further)(const float *restrict x, size_t n, bool first, double weight, WORK *restrict most) {
    WORK by = (WORK)weight;
    for (size_t i = 0; i < n; i++) {
        WORK own = x[i] * by, size = own < 0 ? -own : own, so_far = most[i] < 0 ? -most[i] : most[i];
        most[i] = first || size >= so_far ? own : most[i];
    }
}

/* EMR's vector: the sign of the sum, and the largest size that has it. */
static TARGET void OF(unite)(const Rule *rule, const float *restrict x, size_t n, WORK *restrict total) {
    float high[CHUNK], low[CHUNK];
    for (size_t i = 0; i < n; i++) {
        total[i] = x[i];
        high[i] = x[i] > 0 ? x[i] : 0;
        low[i] = x[i] < 0 ? x[i] : 0;
    }
    for (int64_t e = 1; e < rule->experts; e++) {
        const float *restrict row = x + e * n;
        for (size_t i = 0; i < n; i++) {
            total[i] += row[i];
            high[i] = row[i] > high[i] ? row[i] : high[i];
            low[i] = row[i] < low[i] ? row[i] : low[i];
        }
    }
    for (size_t i = 0; i < n; i++)
        total[i] = total[i] > 0 ? high[i] : low[i];
}

/* From the first of two rows towards the second, by a step at most. */
static TARGET void OF(approach)(const Rule *rule, const float *restrict first, const float *restrict second, size_t n,
                                float *restrict to) {
    if (rule->rounds) { /* as plain code has it: s · second + (1 - s) · first */
        float step = (float)rule->step, bound = (float)rule->least_step;
        for (size_t i = 0; i < n; i++) {
            float way = as_float(as_bits(first[i] - second[i]) & MAGNITUDE), share = 1 / (way < bound ? bound : way) * step;
            share = share < 0 ? 0 : share > 1 ? 1 : share;
            float own = (1 - share) * first[i];
            to[i] = share * second[i] + own;
        }
        return;
    }
    WORK most = (WORK)rule->step, step = (WORK)(rule->step > 0 ? rule->step : 0), bound = (WORK)rule->least_step;
    for (size_t i = 0; i < n; i++) {
        WORK start = first[i], way = (WORK)second[i] - start, size = way < 0 ? -way : way;
        size = size < bound ? bound : size;
        WORK by = way * step / size;
        float there = by == 0 ? first[i] : (float)(start + by);
        to[i] = size <= most ? second[i] : there;
    }
}

/* Which entries one expert marks: where |x| > mark · |vector - x|, or (mark < 0) where its sign is the vector's. */
static TARGET void OF(flags)(const float *restrict x, const WORK *restrict vector, size_t n, double mark, uint8_t *restrict flags) {
    WORK by = (WORK)mark;
    if (mark < 0)
        for (size_t i = 0; i < n; i++)
            flags[i] = ((x[i] > 0) & (vector[i] > 0)) | ((x[i] < 0) & (vector[i] < 0));
    else
        for (size_t i = 0; i < n; i++) {
            WORK own = x[i], away = vector[i] - own;
            flags[i] = (own < 0 ? -own : own) > (away < 0 ? -away : away) * by;
        }
}

/* What holds over all chunks of a range. */
typedef struct {
    int64_t left[MOST][2], select_left; /* room at the thresholds */
    size_t rows, chunk;                 /* experts that are there at once, and elements */
    bool staged;                        /* values are made before they are combined */
    double least_weight; /* below 0 where weights of both signs may cancel */
} OF(Walk);

static void OF(begin)(const Rule *rule, const Range *range, OF(Walk) *walk) {
    bool rows = rule->combine != LINEAR && rule->combine != FURTHEST;
    walk->select_left = rule->select_room;
    walk->rows = rows || rule->selects ? (size_t)rule->experts : 1;
    walk->chunk = least(CHUNK, ROOM / walk->rows / 8 * 8);
    walk->staged =
        range->staged || rule->combine != LINEAR || rule->keys || rule->thresholds || rule->cuts || rule->after || rule->selects;
    double most = 0;
    walk->least_weight = INFINITY;
    for (int64_t e = 0; e < rule->experts; e++) {
        walk->left[e][0] = rule->thresholds ? rule->rooms[e] : 0;
        walk->left[e][1] = rule->cuts ? rule->cut_rooms[e] : 0;
        walk->least_weight = rule->weights[e] < walk->least_weight ? rule->weights[e] : walk->least_weight;
        most = rule->weights[e] > most ? rule->weights[e] : most;
    }
    if (most <= 0 && walk->least_weight < 0)
        walk->least_weight = 0; /* none cancel */
}

/* What the rows of all experts combine to. */
static TARGET void OF(combine)(const Rule *rule, const OF(Walk) *walk, const float *x, size_t n, WORK *sum) {
    if (rule->combine == OVERLAP)
        OF(overlap)(rule, x, n, sum);
    else if (rule->combine == UNITED)
        OF(unite)(rule, x, n, sum);
    else if (rule->combine != LINEAR)
        OF(elect)(rule, x, n, walk->least_weight, sum);
    else
        for (int64_t e = 0; e < rule->experts; e++)
            OF(add)(x + e * n, F32, NULL, n, e == 0, rule->weights[e], sum);
}

/* A chunk from `at` on: x of all experts in `room`, or where the range wants them, and what they combine to. */
static TARGET void OF(change)(const Rule *rule, const Range *range, OF(Walk) *walk, size_t at, size_t n, const float *base,
                              float *room, WORK *sum, Outcome *outcome) {
    float *first = range->staged ? range->staged + at : room;
    size_t stride = range->staged ? range->size : walk->rows == 1 ? 0 : n;
    for (int64_t e = 0; e < rule->experts; e++) {
        int code = range->codes[e + 1];
        const void *stored = from(range->experts[e], code, at);
        if (!walk->staged) {
            outcome->sound &= OF(add)(stored, code, base, n, e == 0, rule->weights[e], sum);
            continue;
        }
        float *x = first + e * stride;
        outcome->sound &= OF(stage)(rule, e, stored, code, base, n, range->offset + at, walk->left[e], x);
        if (walk->rows > 1 || range->staged)
            continue;
        if (rule->combine == LINEAR)
            OF(add)(x, F32, NULL, n, e == 0, rule->weights[e], sum);
        else if (rule->combine == FURTHEST)
            OF(further)(x, n, e == 0, rule->weights[e], sum);
    }
    if (rule->selects)
        walk->select_left = NAME(pick)(first, stride, rule->experts, n, (uint32_t)rule->select, walk->select_left);
    if (!range->staged && (walk->rows > 1 || (rule->combine != LINEAR && rule->combine != FURTHEST)) && rule->combine != NEAR)
        OF(combine)(rule, walk, room, n, sum);
}

/* Entries of the sum that too few experts mark become zero. */
static TARGET void OF(agreed)(const Rule *rule, const Range *range, size_t at, size_t n, const float *base, WORK *restrict sum) {
    float x[CHUNK];
    uint8_t flags[CHUNK];
    uint16_t votes[CHUNK] = {0}, needed = (uint16_t)(rule->marked > MOST ? MOST + 1 : rule->marked);
    for (int64_t e = 0; e < rule->experts; e++) {
        int code = range->codes[e + 1];
        NAME(load)(from(range->experts[e], code, at), code, base, n, x);
        OF(flags)(x, sum, n, rule->marks[e], flags);
        for (size_t i = 0; i < n; i++)
            votes[i] += flags[i];
    }
    for (size_t i = 0; i < n; i++)
        sum[i] = votes[i] < needed ? 0 : sum[i];
}

static TARGET void OF(merge)(const Rule *rule, const Range *range, Outcome *outcome) {
    float base[CHUNK], merged[CHUNK], room[ROOM];
    WORK sum[CHUNK];
    OF(Walk) walk;
    OF(begin)(rule, range, &walk);
    const float *known = rule->deltas ? base : NULL, *theirs = rule->ready ? NULL : known;
    const uint8_t *codes = range->codes;
    for (size_t at = 0, n; at < range->size; at += n) {
        n = least(walk.chunk, range->size - at);
        if (known)
            outcome->sound &= NAME(load)(from(range->base, codes[0], at), codes[0], NULL, n, base);
        OF(change)(rule, range, &walk, at, n, theirs, room, sum, outcome);
        if (range->staged)
            continue;
        if (rule->marks)
            OF(agreed)(rule, range, at, n, theirs, sum);
        if (rule->combine == NEAR)
            OF(approach)(rule, room, room + n, n, merged);
        else if (known)
            OF(move)(sum, base, n, rule->scale, merged);
        else
            OF(divide)(sum, n, rule->divisor, merged);
        int code = codes[rule->experts + 1];
        NAME(round)(merged, known, n, (void *)from(range->out, code, at), code, outcome);
    }
}

/* Which entries an expert marks, as bytes and as bits, and which it touches. */
INLINE void OF(mark)(double mark, const float *restrict x, const WORK *vector, size_t n, uint8_t *flags, uint64_t *words,
                     uint8_t *restrict touched) {
    OF(flags)(x, vector, n, mark, flags);
    memset(flags + n, 0, COLUMNS);
    NAME(pack)(flags, (n + COLUMNS - 1) / COLUMNS, words);
    for (size_t i = 0; i < n; i++)
        touched[i] |= x[i] != 0;
}

/* Counts a chunk, and rounds its vector. */
static TARGET void OF(settle)(const WORK *restrict vector, size_t n, int64_t experts, const uint64_t *words,
                              const uint8_t *restrict touched, float *restrict rounded, int64_t *counts) {
    uint8_t some[CHUNK + COLUMNS];
    uint64_t moved[CHUNK / COLUMNS];
    size_t count = (n + COLUMNS - 1) / COLUMNS;
    uint32_t trained = 0;
    for (size_t i = 0; i < n; i++) {
        rounded[i] = (float)vector[i];
        some[i] = vector[i] != 0;
        trained += touched[i];
    }
    memset(some + n, 0, COLUMNS);
    NAME(pack)(some, count, moved);
    NAME(tally)(words, count, experts, moved, counts + 1);
    counts[0] += trained;
}

/* One block, in the order of its branches: a vector that needs no thresholds, with its masses. */
static TARGET void OF(mask_block)(const Rule *rule, const Range *range, const OF(Walk) *walk, const Masks *masks, size_t at,
                                  double *found, Outcome *outcome) {
    enum { SIZE = BRANCH * COLUMNS };
    float base[SIZE], kept[SIZE], rounded[SIZE], *x = masks->rows;
    WORK vector[SIZE];
    uint8_t flags[SIZE + COLUMNS], touched[SIZE];
    uint64_t words[MASKED * BRANCH];
    const uint8_t *codes = range->codes;
    int64_t experts = rule->experts;
    int out = codes[experts + 1], waiting = 0;
    size_t n = least(BLOCK, range->size - at), width = 2 * (size_t)experts * COLUMNS;
    const void *theirs = from(range->base, codes[0], at);
    for (int64_t e = -1; e < experts; e++) { /* in order, once, since branches jump about */
        const char *own = e < 0 ? theirs : from(range->experts[e], codes[e + 1], at);
        for (size_t i = 0; i < n * width_of(codes[e + 1]); i += 64)
            __builtin_prefetch(own + i, 0, 2);
    }
    for (size_t number = 0; number < BRANCHES; number++, waiting++) {
        size_t row = first_row(number);
        double *to = masks->sums + waiting * width;
        outcome->sound &= NAME(branch)(theirs, codes[0], NULL, n, row, AS_ROWS(base));
        for (int64_t e = 0; e < experts; e++)
            outcome->sound &= NAME(branch)(from(range->experts[e], codes[e + 1], at), codes[e + 1], AS_ROWS(base), n, row,
                                           AS_ROWS(x + e * SIZE));
        OF(combine)(rule, walk, x, SIZE, vector);
        memset(touched, 0, sizeof touched);
        for (int64_t e = 0; e < experts; e++) {
            OF(mark)(rule->marks ? rule->marks[e] : -1, x + e * SIZE, vector, SIZE, flags, words + e * BRANCH, touched);
            for (int i = 0; i < SIZE; i++)
                kept[i] = flags[i] ? (float)vector[i] : 0;
            NAME(branch_size)(AS_ROWS(x + e * SIZE), to + e * COLUMNS);
            NAME(branch_size)(AS_ROWS(kept), to + (experts + e) * COLUMNS);
        }
        OF(settle)(vector, SIZE, experts, words, touched, rounded, masks->counts);
        for (size_t r = 0; r < BRANCH; r++) {
            size_t first = (row + r * BRANCHES) * COLUMNS, here = first < n ? least(n - first, COLUMNS) : 0;
            NAME(round)(rounded + r * COLUMNS, NULL, here, (void *)from(range->out, out, at + first), out, outcome);
            for (int64_t e = 0; e < experts; e++)
                memcpy(masks->bits[e] + (at + first) / 8, words + e * BRANCH + r, (here + 7) / 8);
        }
        waiting = joined(masks->sums, width, waiting, number);
    }
    for (size_t i = 0; i < 2 * (size_t)experts; i++)
        found[i] = folded(masks->sums + i * COLUMNS);
}

/* The vector, and which of its entries each expert marks. */
static TARGET void OF(masks)(const Rule *rule, const Range *range, const Masks *masks, Outcome *outcome) {
    float base[CHUNK], x[CHUNK], rounded[CHUNK], room[ROOM];
    WORK vector[CHUNK];
    uint8_t flags[CHUNK + COLUMNS], touched[CHUNK];
    uint64_t words[MASKED * BRANCH];
    OF(Walk) walk;
    OF(begin)(rule, range, &walk);
    const uint8_t *codes = range->codes;
    int64_t experts = rule->experts;
    int out = codes[experts + 1];
    for (size_t at = 0; masks->masses && at < range->size; at += BLOCK)
        OF(mask_block)(rule, range, &walk, masks, at, masks->masses + at / BLOCK * 2 * (size_t)experts, outcome);
    size_t chunk = least(CHUNK, ROOM / (size_t)experts / COLUMNS * COLUMNS);
    for (size_t at = masks->masses ? range->size : 0, n; at < range->size; at += n) {
        n = least(chunk, range->size - at);
        size_t count = (n + COLUMNS - 1) / COLUMNS;
        outcome->sound &= NAME(load)(from(range->base, codes[0], at), codes[0], NULL, n, base);
        OF(change)(rule, range, &walk, at, n, base, room, vector, outcome);
        memset(touched, 0, n);
        for (int64_t e = 0; e < experts; e++) {
            int code = codes[e + 1];
            NAME(load)(from(range->experts[e], code, at), code, base, n, x);
            OF(mark)(rule->marks ? rule->marks[e] : -1, x, vector, n, flags, words + e * count, touched);
            memcpy(masks->bits[e] + at / 8, words + e * count, (n + 7) / 8);
        }
        OF(settle)(vector, n, experts, words, touched, rounded, masks->counts);
        NAME(round)(rounded, NULL, n, (void *)from(range->out, out, at), out, outcome);
    }
}

#undef OF
#undef NAME_

#endif

#ifndef LEVEL /* --------------------------------------------------------------------------------------- once, at the end */

static const Level *const levels[] = {
    &level_plain,
#if defined(__x86_64__)
    &level_avx2,
    &level_avx512,
#endif
};

static int best_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        return 1;
#endif
    return 0;
}

static int level; /* set before the first call */

EXPORT int twinmerge_fused_version(void) { return VERSION; }

/* The instruction set in use: 0 any, 1 AVX2, 2 AVX-512. At most `wanted`, if that is not negative (tests ask). */
EXPORT int twinmerge_fused_level(int wanted) {
    int best = best_level();
    level = wanted < 0 || wanted > best ? best : wanted;
    return level;
}

/* Whether sums are taken in double. */
static bool is_wide(const Rule *rule, const Range *range) {
    bool wide = range->base && range->codes[0] == F32;
    for (int64_t e = 0; e < rule->experts; e++)
        wide |= range->codes[e + 1] == F32;
    return rule->ready ? rule->ready == 2 : wide;
}

/* found: changed, erased, whether all inputs are sound, whether the result fits. staged: NULL, or room for a row of each
 * expert, which is then all that is written. */
EXPORT void twinmerge_fused_merge(const Rule *rule, const void *base, const void *const *experts, void *out, const char *codes,
                                  size_t size, uint64_t offset, float *staged, int64_t *found) {
    Range range = {base, experts, out, (const uint8_t *)codes, size, offset, staged};
    Outcome outcome = {0, 0, 1, 1};
    levels[level]->merge[is_wide(rule, &range)](rule, &range, &outcome);
    found[0] = outcome.changed, found[1] = outcome.erased, found[2] = outcome.sound, found[3] = outcome.fits;
}

/* bits: where each expert's go; counts, masses, rows, sums: as of `Masks`; found: changed and erased are 0. */
EXPORT void twinmerge_fused_masks(const Rule *rule, const void *base, const void *const *experts, void *out, const char *codes,
                                  size_t size, uint64_t offset, uint8_t *const *bits, int64_t *counts, double *masses,
                                  float *rows, double *sums, int64_t *found) {
    Range range = {base, experts, out, (const uint8_t *)codes, size, offset, NULL};
    Masks masks = {bits, counts, masses, rows, sums};
    Outcome outcome = {0, 0, 1, 1};
    levels[level]->masks[is_wide(rule, &range)](rule, &range, &masks, &outcome);
    found[0] = outcome.changed, found[1] = outcome.erased, found[2] = outcome.sound, found[3] = outcome.fits;
}

/* found: as above; codes: of experts and out. */
EXPORT void twinmerge_fused_weigh(const Rule *rule, const void *base, const void *const *experts, const void *const *fisher,
                                  void *out, const char *codes, size_t size, int64_t *found) {
    Range range = {base, experts, out, (const uint8_t *)codes, size, 0, NULL};
    Outcome outcome = {0, 0, 1, 1};
    levels[level]->weigh(rule, &range, fisher, &outcome);
    found[0] = outcome.changed, found[1] = outcome.erased, found[2] = outcome.sound, found[3] = outcome.fits;
}

/* found: a sum for each pair of experts, block by block; rows, sums: as of `gram` above. */
EXPORT void twinmerge_fused_gram(const void *base, const void *const *experts, const char *codes, size_t count, size_t size,
                                 float *rows, double *sums, double *found) {
    Range range = {base, experts, NULL, (const uint8_t *)codes, size, 0};
    for (size_t at = 0; at < size; at += BLOCK, found += count * (count + 1) / 2)
        levels[level]->gram(&range, count, at, rows, sums, found);
}

/* found: two sums for each block; offset: index of the first element in its tensor. */
EXPORT void twinmerge_fused_norms(const void *x, int code, const void *base, int of_base, size_t size, const uint64_t *key,
                                  uint32_t below, uint64_t offset, double *found) {
    for (size_t at = 0; at < size; at += BLOCK, found += 2)
        levels[level]->norms(from(x, code, at), code, base ? from(base, of_base, at) : NULL, of_base, least(BLOCK, size - at),
                             key, below, offset + at, found);
}

/* counts: above, and equal to each of the shared values; returns how many `inside` has. */
EXPORT size_t twinmerge_fused_bracket(const void *x, int code, const void *base, int of_base, size_t size, int32_t low,
                                      uint32_t width, const int32_t *shared, int64_t *counts, int32_t *inside) {
    return levels[level]->bracket(x, code, base, of_base, size, low, width, shared, counts, inside);
}

/* Returns whether all are sound. */
EXPORT int twinmerge_fused_copy(const void *x, int code, size_t size, void *out) { return levels[level]->copy(x, code, size, out); }

/* x: rows of floats, one for each expert. */
EXPORT void twinmerge_fused_spread(const float *x, size_t experts, size_t size, float *to) {
    for (size_t at = 0; at < size; at += CHUNK)
        levels[level]->spread(x + at, size, (int64_t)experts, least(CHUNK, size - at), to + at);
}

/* size: of whole rows; out: a float for each; room: twice a row's entries, then its draws. Returns whether all are sound. */
EXPORT int twinmerge_fused_ranked(const void *x, int code, const void *base, int of_base, size_t size, uint64_t offset,
                                  size_t length, int rising, const uint64_t *key, const uint32_t *below, const double *factors,
                                  float *out, uint64_t *room) {
    Ranks ranks = {length, rising, key, below, factors};
    Sorting sorting = {room, room + length, (uint32_t *)(room + 2 * length)};
    return levels[level]->ranked(x, code, base, of_base, size, offset, &ranks, out, sorting);
}

#endif
