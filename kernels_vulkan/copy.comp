#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
// Copies of blocks and of parts of them, between any banks.
#define KVL_PAGES_ACCESS
#include "tables.glsl"

const uint KVL_COPY_UNITS = 4; // in flight

// workgroups (copies, any): those of a column share each copy
void main() {
    uint number = push.first + gl_WorkGroupID.x;
    if (number >= push.n) return;
    uint w = push.list + number * 6; // a kvli_gpu_copy
    uint to = tables[w] >> 4, to_bank = tables[w + 1], from = tables[w + 2] >> 4, from_bank = tables[w + 3], n = tables[w + 4] >> 4;
    uint threads = gl_NumWorkGroups.y * WORKGROUP, i = gl_WorkGroupID.y * WORKGROUP + gl_LocalInvocationID.x;
    for (; i + (KVL_COPY_UNITS - 1) * threads < n; i += KVL_COPY_UNITS * threads) {
        uvec4 v[KVL_COPY_UNITS];
        [[unroll]] for (uint j = 0; j < KVL_COPY_UNITS; j++) v[j] = pages[from_bank].d[from + i + j * threads];
        [[unroll]] for (uint j = 0; j < KVL_COPY_UNITS; j++) pages[to_bank].d[to + i + j * threads] = v[j];
    }
    for (; i < n; i += threads) pages[to_bank].d[to + i] = pages[from_bank].d[from + i];
}
