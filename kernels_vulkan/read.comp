#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_control_flow_attributes : require
// For benchmarks: the words of a range, added.
#include "tables.glsl"

layout(set = 0, binding = KVLI_VK_TAINT, std430) buffer kvl_sum { uint sum[]; };

const uint KVL_READ_UNITS = 8; // in flight
shared uint kvl_total;

uint kvl_words(uvec4 v) { return v.x + v.y + v.z + v.w; }

void main() {
    uint threads = gl_NumWorkGroups.x * WORKGROUP, i = gl_GlobalInvocationID.x, total = 0;
    if (gl_LocalInvocationID.x == 0) kvl_total = 0;
    for (; i + (KVL_READ_UNITS - 1) * threads < push.n; i += KVL_READ_UNITS * threads) {
        uvec4 v[KVL_READ_UNITS];
        [[unroll]] for (uint j = 0; j < KVL_READ_UNITS; j++) v[j] = pages[push.first].d[push.list + i + j * threads];
        [[unroll]] for (uint j = 0; j < KVL_READ_UNITS; j++) total += kvl_words(v[j]);
    }
    for (; i < push.n; i += threads) total += kvl_words(pages[push.first].d[push.list + i]);
    barrier();
    atomicAdd(kvl_total, total);
    barrier();
    if (gl_LocalInvocationID.x == 0) atomicAdd(sum[0], kvl_total);
}
