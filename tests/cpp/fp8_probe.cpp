// The lane conversions of one instruction set as plain functions over arrays; compiled once per instruction set.
#include "cpu/fp8.h"
#include "cpu/fp8_encode.h"

namespace pyroute::cpu::PYROUTE_ISA {

void encode_e4m3(const float *x, uint8_t *codes) { store(codes, fp8_encode<E4m3>(load<f32x8>(x))); }
void encode_e5m2(const float *x, uint8_t *codes) { store(codes, fp8_encode<E5m2>(load<f32x8>(x))); }
void encode_run_e4m3(const float *x, int64_t n, uint8_t *codes) {
    const float one[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    encode_run<Float32, E4m3, false>(x, n, InversePerBlock{one, 7}, codes);
}
void encode_run_e5m2(const float *x, int64_t n, uint8_t *codes) {
    const float one[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    encode_run<Float32, E5m2, false>(x, n, InversePerBlock{one, 7}, codes);
}
void encode_run_bf16(const uint16_t *x, int64_t n, uint8_t *codes) {
    const float one[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    encode_run<Bfloat16, E4m3, false>(x, n, InversePerBlock{one, 7}, codes);
}
void decode_e4m3(const uint8_t *codes, float *x) { store(x, E4m3::decode(load<u8x8>(codes))); }
void decode_e5m2(const uint8_t *codes, float *x) { store(x, E5m2::decode(load<u8x8>(codes))); }
void decode32_e4m3(const uint8_t *codes, float *x) { fp8_decode32(E4m3{}, codes, x); }
void decode32_e5m2(const uint8_t *codes, float *x) { fp8_decode32(E5m2{}, codes, x); }
void encode_f16(const float *x, uint16_t *half) { store(half, f32_to_f16(load<f32x8>(x))); }
void decode_f16(const uint16_t *half, float *x) { store(x, f16_to_f32(load<u16x8>(half))); }

} // namespace pyroute::cpu::PYROUTE_ISA
