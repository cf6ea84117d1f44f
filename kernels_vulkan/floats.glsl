// f16 and bfloat16 by integer arithmetic: to the nearest, ties to even, on every device.
#ifndef KVL_FLOATS_GLSL
#define KVL_FLOATS_GLSL

// Operations that are not fused with others.
float kvl_mul(float a, float b) {
    precise float product = a * b;
    return product;
}
float kvl_add(float a, float b) {
    precise float sum = a + b;
    return sum;
}
float kvl_sub(float a, float b) {
    precise float difference = a - b;
    return difference;
}

// m / 2^n to the nearest, ties to even; m < 2^24.
uint kvl_shift_rounded(uint m, uint n) {
    n = min(n, 25u);
    return (m + (1u << (n - 1)) - 1 + (m >> n & 1u)) >> n;
}

float kvl_f16_to_f32(uint h) {
    uint sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u) return uintBitsToFloat(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x400u) return uintBitsToFloat(sign | ((magnitude << 13) + 0x38000000u));
    return uintBitsToFloat(sign | floatBitsToUint(kvl_mul(float(magnitude), 5.9604644775390625e-8)));
}

uint kvl_f32_to_f16(uint bits) {
    uint sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu, h;
    if (magnitude > 0x7f800000u)
        h = 0x7e00u | (magnitude >> 13 & 0x3ffu);
    else if (magnitude >= 0x477ff000u) // 65520 and up
        h = 0x7c00u;
    else if (magnitude >= 0x38800000u)
        h = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    else // in steps of 2^-24
        h = kvl_shift_rounded((magnitude & 0x7fffffu) | 0x800000u, 126u - (magnitude >> 23));
    return sign | h;
}

uint kvl_f32_to_bf16(uint bits) {
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
#endif
