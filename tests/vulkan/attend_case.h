// Cases of attention (tests/common/attend_case.h) by a shader of kernels_vulkan, decode or prefill, merged where an item is split.
#ifndef VULKAN_ATTEND_CASE_H
#define VULKAN_ATTEND_CASE_H
#include <map>
#include "vk_run.h"
#include "../common/attend_case.h"

namespace attend {

// A shader as a case runs it: lane and row counts are the kernel's to choose.
struct Shader {
    const char *name;
    uint32_t variant; // KVLI_VK_* bits
    uint32_t rows, workgroup, lanes;
};

class Device {
  public:
    enum { BANKS = 3 };
    vkr r;

    bool open(unsigned bits, bool timing, size_t bank_bytes) {
        if (!vkr_open(&r, bits, timing)) return false;
        for (vkr_buffer &bank : banks) bank = vkr_buffer_make(&r, bank_bytes, nullptr);
        return true;
    }
    void close() { vkr_close(&r); }

    // The shader over all of a case's rows.
    Result run(const Case &c, const Shader &shader) {
        fill_banks();
        Problem p(c, [this](const uint8_t *bytes, size_t n) { return put(bytes, n); });
        vkr_bindings b = bind(p, shader);
        kvli_vk_push push = make_push(p);
        uint32_t items = (uint32_t)p.plan.items.size(), merges = (uint32_t)p.plan.merges.size();
        // Grids are larger than the lists by one: workgroups past the end have nothing to do.
        push.n = items;
        vkr_dispatch(&r, pipeline(c, shader), &b, &push, items + 1, c.kv_heads, 1);
        if (merges) {
            push.list = merges_at(p);
            push.n = merges;
            Shader merge = {"merge", shader.variant & KVLI_VK_STORAGE16, 1, KVLI_VK_MERGE_WORKGROUP, 1};
            vkr_dispatch(&r, pipeline(c, merge), &b, &push, merges + 1, c.kv_heads, 1);
        }
        memcpy(p.out.base(), b.b.map, p.out.bytes.size() - 16);
        Result result = p.judge(c.preset->tolerance);
        free_buffers(b);
        return result;
    }

    // Microseconds of a case's items and merges.
    double time(const Case &c, const Shader &shader, double seconds) {
        fill_banks();
        Problem p(c, [this](const uint8_t *bytes, size_t n) { return put(bytes, n); });
        vkr_bindings b = bind(p, shader);
        kvli_vk_push push = make_push(p);
        push.n = (uint32_t)p.plan.items.size();
        double us = vkr_time(&r, pipeline(c, shader), &b, &push, push.n, c.kv_heads, 1, seconds);
        free_buffers(b);
        return us;
    }

  private:
    vkr_buffer banks[BANKS];
    size_t used[BANKS];
    uint32_t next_bank;
    std::map<std::vector<uint32_t>, vkr_pipeline> pipelines;

    void fill_banks() {
        for (uint32_t i = 0; i < BANKS; i++) {
            memset(banks[i].map, 0xff, banks[i].bytes);
            used[i] = 256;
        }
        next_bank = 0;
    }
    // Into the banks by turns.
    uint64_t put(const uint8_t *bytes, size_t n) {
        uint32_t bank = next_bank++ % BANKS;
        size_t at = used[bank];
        used[bank] = (at + n + 128 + 127) / 128 * 128;
        assert_true(used[bank] <= banks[bank].bytes);
        memcpy(banks[bank].map + at, bytes, n);
        return (uint64_t)bank << 32 | at;
    }

    vkr_pipeline *pipeline(const Case &c, const Shader &s) {
        const Preset &p = *c.preset;
        std::vector<uint32_t> spec(KVLI_VK_SPECIALISATIONS);
        spec[KVLI_VK_WORKGROUP] = s.workgroup;
        spec[KVLI_VK_BANKS] = BANKS;
        spec[KVLI_VK_K_FORMAT] = p.k;
        spec[KVLI_VK_V_FORMAT] = p.v;
        spec[KVLI_VK_EXACT_FORMAT] = p.exact;
        spec[KVLI_VK_ROTATED] = (p.k_rotated ? 1 : 0) | (p.v_rotated ? 2 : 0);
        spec[KVLI_VK_DIM] = c.dim;
        spec[KVLI_VK_BLOCK_TOKENS] = c.block_tokens;
        spec[KVLI_VK_ROWS] = s.rows;
        spec[KVLI_VK_LANES] = s.lanes;
        std::vector<uint32_t> key(spec);
        key.push_back(s.variant);
        key.push_back((uint32_t)s.name[0]);
        auto found = pipelines.find(key);
        if (found == pipelines.end())
            found = pipelines.emplace(key, vkr_pipeline_make(&r, s.name, s.variant, spec.data())).first;
        return &found->second;
    }

    static uint32_t items_at() { return 12; } // words: two spans first
    static uint32_t merges_at(const Problem &p) { return items_at() + 8 * (uint32_t)p.plan.items.size(); }
    static uint32_t entries_at(const Problem &p) { return merges_at(p) + 8 * (uint32_t)p.plan.merges.size(); }

    static kvli_vk_tensor tensor(const Tensor &t) { return {t.offset, t.row_stride, t.head_stride, t.dtype}; }

    static kvli_vk_push make_push(const Problem &p) {
        kvli_vk_push push = {};
        push.a = tensor(p.q);
        push.b = tensor(p.out);
        push.layer = 1;
        push.list = items_at();
        push.spans = 0;
        push.entries = entries_at(p);
        push.n_q_heads = p.heads;
        push.n_kv_heads = p.c.kv_heads;
        push.gqa = p.c.gqa;
        return push;
    }

    vkr_bindings bind(Problem &p, const Shader &) {
        const Layout *layouts[2] = {&p.s.packed, &p.s.exact};
        kvli_vk_layer layers[2];
        vkr_bindings b;
        memset(&b, 0, sizeof b);
        memset(layers, 0xff, sizeof layers); // layer 0 is another's
        kvli_vk_layer &l = layers[1];
        for (uint32_t i = 0; i < 2; i++) {
            l.offset[i] = (uint32_t)(layouts[i]->offset / 16);
            l.head_stride[i] = (uint32_t)(layouts[i]->head_stride / 16);
            l.v_offset[i] = (uint32_t)(layouts[i]->v_offset / 16);
        }
        l.window = p.c.window;
        l.sink_tokens = p.c.sink_tokens;
        l.sink_logits = p.c.sink_logits ? (uint32_t)(sizeof layers / 4) : KVLI_GPU_NONE;
        l.scale = p.scale;
        l.softcap = p.c.softcap;
        l.k_global = l.v_global = 1.0f / 8;
        b.layers = vkr_buffer_make(&r, sizeof layers + p.logits.size() * 4, nullptr);
        memcpy(b.layers.map, layers, sizeof layers);
        memcpy(b.layers.map + sizeof layers, p.logits.data(), p.logits.size() * 4);
        b.tables = vkr_buffer_make(&r, entries_at(p) * 4 + p.entries.size() * 8, nullptr);
        memcpy(b.tables.map, p.spans, sizeof p.spans);
        memcpy(b.tables.map + items_at() * 4, p.plan.items.data(),
               p.plan.items.size() * sizeof(kvli_gpu_item));
        if (!p.plan.merges.empty())
            memcpy(b.tables.map + merges_at(p) * 4, p.plan.merges.data(),
                   p.plan.merges.size() * sizeof(kvli_gpu_merge));
        memcpy(b.tables.map + entries_at(p) * 4, p.entries.data(), p.entries.size() * 8);
        for (uint32_t i = 0; i < BANKS; i++) b.pages[i] = banks[i];
        b.partial_o = vkr_buffer_make(&r, (size_t)p.plan.partials * p.c.kv_heads * p.c.dim * 4, nullptr);
        b.partial_ml = vkr_buffer_make(&r, (size_t)p.plan.partials * p.c.kv_heads * 8, nullptr);
        b.a = vkr_buffer_make(&r, p.q.bytes.size() - 16, p.q.base());
        b.b = vkr_buffer_make(&r, p.out.bytes.size() - 16, p.out.base());
        return b;
    }
    void free_buffers(vkr_bindings &b) {
        for (vkr_buffer *buffer : {&b.layers, &b.tables, &b.partial_o, &b.partial_ml, &b.a, &b.b})
            vkr_buffer_free(&r, buffer);
    }
};

} // namespace attend
#endif
