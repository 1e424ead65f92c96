// Storage of packed weights.
//
// ROWS: as given, row by row. VNNI: [n / 16][k / 4][16][4] bytes of w + 128, n padded to 16 and k to 64 with zero
// weights: a 64-byte vector is 4 inputs of 16 outputs, and 16 such vectors are one AMX tile. The offset makes the
// weights the unsigned operand; 128 * sum(a) is taken off the sums again.
#include "pack.h"

#include <string.h>

namespace va {

size_t packed_bytes(Format format, i64 n, i64 k) {
    if (format == ROWS) return (size_t)(n * k);
    return (size_t)((n + 15) / 16 * 16) * (size_t)((k + 63) / 64 * 64);
}

void pack_rows(Format format, const int8_t* w, i64 n, i64 k, i64 n0, i64 n1, uint8_t* out) {
    if (format == ROWS) {
        memcpy(out + n0 * k, w + n0 * k, (size_t)((n1 - n0) * k));
        return;
    }
    const i64 kp = (k + 63) / 64 * 64;
    for (i64 p = n0 / 16; p * 16 < n1; p++) {
        uint8_t* panel = out + p * 16 * kp;
        for (i64 c = 0; c < 16; c++) {
            const i64 j = p * 16 + c;
            uint8_t* at = panel + c * 4;
            i64 x = 0;
            if (j < n) {
                const int8_t* row = w + j * k;
                for (; x + 4 <= k; x += 4, at += 64) {
                    uint32_t four;
                    memcpy(&four, row + x, 4);
                    four ^= 0x80808080u;
                    memcpy(at, &four, 4);
                }
                if (x < k) {
                    for (int b = 0; b < 4; b++) at[b] = x + b < k ? (uint8_t)(row[x + b] ^ 0x80) : 0x80;
                    x += 4, at += 64;
                }
            }
            for (; x < kp; x += 4, at += 64) memset(at, 0x80, 4);
        }
    }
}

}  // namespace va
