// How quantised matrices lie in memory: the one place that says it, for every device.
//
// A K x N matrix is cut into tiles of 32 columns, and the rows of a tile into chunks of 32. All of a tile lies together,
// so a product walks memory from front to back.
//
//     codes [N/32][R][32]     tile 0: word 0 of columns 0..31, word 1 of columns 0..31, ...; then tile 1
//
// EXL2: a chunk whose codes have b bits is b words of each column. They are one bit string, lowest bit first; the code
// of row r is bits [r*b, r*b + b). For b = 3:
//
//     word 0:  |r0 |r1 |r2 | ... |r9 |r10     bits 0-2, 3-5, ..., 30-31
//     word 1:    r10|r11|r12| ...             bit 0 is the top bit of row 10
//
//     scales [N/32][G][4]     nibble n % 8 of word n / 8 is scale - 1 of column n of the tile
//     group_scales [G]        float16
//     groups [G][2]           (bits, rows); rows are whole chunks
//
//     weight = half((code - 2^(b-1)) * half(scale^2 * group_scale))
//
// The same matrix for dot products of bytes ("planes"): still b words a column and chunk, but the codes of four rows lie in
// the four bytes of a 32-bit lane, and wider codes are split into a low and a high plane. A unit is 128 bytes: four rows
// (a quad) side by side for 32 columns.
//
//     byte of row 4q + i, column n:        unit byte 4n + i
//     b = 8     8 units, quad q in unit q
//     b = 4     4 units, quad 2j in the low nibbles of unit j, quad 2j + 1 in the high ones
//     b = 2     2 units, quad 4j + m in bits 2m, 2m + 1 of unit j
//     b = 3     as b = 2, then 1 unit with the top bits: of quad m in bit m
//     b = 5     as b = 4, then 1 unit with the top bits: of quad m in bit m
//     b = 6     as b = 4, then 2 units with the top two bits, like those of b = 2
//
//     plane scales [N/32][G][16]   byte i: scale - 1 of column i in the low nibble, of column 16 + i in the high one
//
// GPTQ: a word holds eight rows of a column, lowest nibble first. (As planes: as EXL2 with b = 4, rows sorted by group.)
//
//     scales [N/32][G][32]    float16
//     zeros  [N/32][G][32]    unsigned bytes, 0 to 16
//
//     weight = half((code - zero) * scale)
#pragma once

namespace exl2 {

constexpr int kAbiVersion = 3;  // raised when a function of the C interface changes

constexpr int kTileColumns = 32;
constexpr int kChunkRows = 32;
constexpr int kScaleWords = 4;        // words of scale nibbles for one group of one tile
constexpr int kGptqRowsPerWord = 8;
constexpr int kQuads = 8;             // of four rows, in a chunk
constexpr int kUnitBytes = 128;       // a quad of 32 columns

static_assert(kChunkRows == 32, "b words of 32 bits hold exactly 32 codes of b bits");
static_assert(kScaleWords * 8 == kTileColumns, "eight scale nibbles a word");
static_assert(kQuads * 4 == kChunkRows && kUnitBytes == 4 * kTileColumns, "a byte for each row of a quad and column");
static_assert(kGptqRowsPerWord * 4 == 32, "eight 4-bit codes a word");

}  // namespace exl2
