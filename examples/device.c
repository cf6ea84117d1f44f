/* device: tensors in a GPU's memory, a lent context and stream, and steps replayed as a CUDA graph. The model is a toy: q, k
   and v are the same made-up rows in every layer and step, where yours has its own kernels between them. */
#include "gpu.h"
#include "kvlite.h"

enum { LAYERS = 4, Q_HEADS = 8, KV_HEADS = 2, DIM = 64, ROWS = 32, REQUESTS = 3, NEW_TOKENS = 40 };

typedef struct model {
    gpu g;
    kvl_cache *cache;
    kvl_sched *sched;
    gpu_ptr q, k, v, out; /* [ROWS][heads][DIM] in F16 */
    void *graph;          /* of a step's layers, ready to be launched */
    uint64_t key;         /* of the step that it was captured in */
    unsigned steps, replayed;
} model;

static gpu_ptr made_up(const gpu *g, unsigned heads, unsigned seed) {
    static uint16_t rows[ROWS * Q_HEADS * DIM];
    for (unsigned i = 0; i < ROWS * heads * DIM; i++)
        rows[i] = (uint16_t)(0x3000 + (i * 2654435761u + seed) % 0x800); /* 0.125 to 0.5 */
    return gpu_uploaded(g, rows, (size_t)ROWS * heads * DIM * 2);
}

static bool open_all(model *m, char *err, size_t n) {
    if (!gpu_open(&m->g, 0, err, n)) return false;
    kvl_cache_desc d = {
        .geometry = {.n_layers = LAYERS, .n_q_heads = Q_HEADS, .n_kv_heads = KV_HEADS, .k_dim = DIM},
        .context_desc = {.backend = KVL_BACKEND_CUDA,
                         .cuda_context = m->g.context, /* lent: your CUcontext, */
                         .cuda_stream = m->g.stream},  /* and the stream that your kernels run in */
        .device_bytes = 16 << 20,
        .max_step_tokens = ROWS,
        .device_tensors = true,
        .error = err,
        .error_size = n};
    if (kvl_cache_create(&d, &m->cache) != KVL_OK) return false;
    if (kvl_sched_create(m->cache, NULL, &m->sched) != KVL_OK)
        return llm_fail(err, n, "%s", kvl_last_error(m->cache));
    m->q = made_up(&m->g, Q_HEADS, 1);
    m->k = made_up(&m->g, KV_HEADS, 2);
    m->v = made_up(&m->g, KV_HEADS, 3);
    m->out = gpu_alloc(&m->g, (size_t)ROWS * Q_HEADS * DIM * 2);
    return true;
}

static kvl_tensor tensor(gpu_ptr at) {
    return (kvl_tensor){.data = (void *)(uintptr_t)at, .memory = KVL_MEMORY_DEVICE, .dtype = KVL_DTYPE_F16};
}

/* Enqueues and returns: nothing waits for the device. */
static kvl_result layers(model *m, const kvl_step *step) {
    kvl_tensor q = tensor(m->q), k = tensor(m->k), v = tensor(m->v), out = tensor(m->out);
    kvl_result r = KVL_OK;
    for (uint32_t l = 0; r == KVL_OK && l < LAYERS; l++)
        r = kvl_attend(m->cache, step, l, &q, &k, &v, &out); /* your kernels before and after it */
    return r;
}

/* The first step with a key is captured, those with the same key are replays of it. */
static kvl_result run(model *m, const kvl_step *step) {
    kvl_result r = KVL_OK;
    void *captured;
    if (m->graph && m->key == step->graph_key) {
        GPU(&m->g, GraphLaunch, m->graph, m->g.stream);
        m->replayed++;
        return kvl_step_replayed(m->cache, step);
    }
    if (m->graph) GPU(&m->g, GraphExecDestroy, m->graph);
    GPU(&m->g, StreamBeginCapture, m->g.stream, GPU_CAPTURE_THREAD_LOCAL);
    r = layers(m, step);
    GPU(&m->g, StreamEndCapture, m->g.stream, &captured);
    GPU(&m->g, GraphInstantiate, &m->graph, captured, 0);
    GPU(&m->g, GraphDestroy, captured);
    GPU(&m->g, GraphLaunch, m->graph, m->g.stream);
    m->key = step->graph_key;
    return r;
}

static kvl_result generate(model *m) {
    const kvl_step *step;
    kvl_result r;
    while ((r = kvl_sched_plan(m->sched, &step)) == KVL_OK) {
        int32_t next[ROWS] = {0}; /* "sampled": yours come from the logits of step->logit_rows */
        if ((r = run(m, step)) != KVL_OK) break;
        gpu_sync(&m->g); /* what sampling does */
        if ((r = kvl_sched_commit(m->sched, step, next)) != KVL_OK) break;
        m->steps++;
    }
    return r;
}

int main(void) {
    static model m;
    char err[LLM_ERR_LEN] = "";
    if (!open_all(&m, err, sizeof err)) {
        fprintf(stderr, "device: %s\n", err);
        return 1;
    }
    for (int i = 0; i < REQUESTS; i++) {
        const int32_t prompt[] = {i, 1, 2, 3, 4, 5};
        kvl_request request = {.tokens = prompt, .n_tokens = 6, .max_new_tokens = NEW_TOKENS};
        kvl_req handle;
        if (kvl_sched_submit(m.sched, &request, &handle) != KVL_OK) return 1;
    }
    kvl_sched_close(m.sched);
    kvl_result r = generate(&m);
    if (r == KVL_DRAINED)
        printf("%s: %u steps, %u of them replayed\n", m.g.name, m.steps, m.replayed);
    else
        fprintf(stderr, "device: %s: %s\n", kvl_result_name(r), kvl_sched_last_error(m.sched));
    if (m.graph) GPU(&m.g, GraphExecDestroy, m.graph);
    kvl_sched_destroy(m.sched);
    kvl_cache_destroy(m.cache);
    const gpu_ptr all[] = {m.q, m.k, m.v, m.out};
    for (int i = 0; i < 4; i++) gpu_free(&m.g, all[i]);
    gpu_close(&m.g);
    return r != KVL_DRAINED;
}
