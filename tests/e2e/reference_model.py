"""The forward pass of llama models in numpy and double precision: what the runner is compared with.

It shares nothing with the runner: the file is read and its weights are decoded by the gguf package, rotation angles,
products and softmax are in double precision, and keys and values are kept as they are. One call is one causal pass
over all tokens; there is no cache.
"""
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize


class ReferenceModel:
    def __init__(self, path):
        reader = GGUFReader(path)

        def key(name):
            return reader.fields["llama." + name].contents()

        self.weights = {t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
        self.n_layers = key("block_count")
        self.n_q_heads = key("attention.head_count")
        self.n_kv_heads = key("attention.head_count_kv")
        self.head_dim = key("embedding_length") // self.n_q_heads
        self.eps = key("attention.layer_norm_rms_epsilon")
        assert key("rope.dimension_count") == self.head_dim, "rotation of a part of a head is not built here"
        self.rope_frequencies = float(key("rope.freq_base")) ** -(np.arange(0, self.head_dim, 2) / self.head_dim)

    def project(self, x, name):
        """x [rows, in] times a weight matrix [out, in]."""
        return x @ self.weights[name + ".weight"].astype(np.float64).T

    def norm(self, x, name):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.weights[name + ".weight"]

    def rope(self, x):
        """x [rows, heads, dim]: rotates the pairs (0, 1), (2, 3) ..., which is the order in GGUF files."""
        angles = np.arange(len(x))[:, None, None] * self.rope_frequencies
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    def attention(self, x, layer):
        n = len(x)
        q = self.rope(self.project(x, layer + "attn_q").reshape(n, self.n_q_heads, self.head_dim))
        k = self.rope(self.project(x, layer + "attn_k").reshape(n, self.n_kv_heads, self.head_dim))
        v = self.project(x, layer + "attn_v").reshape(n, self.n_kv_heads, self.head_dim)
        future = np.triu(np.ones((n, n), bool), 1)
        out = np.empty_like(q)
        for head in range(self.n_q_heads):
            kv_head = head // (self.n_q_heads // self.n_kv_heads)
            scores = q[:, head] @ k[:, kv_head].T / np.sqrt(self.head_dim)
            scores[future] = -np.inf
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[:, head] = p / p.sum(axis=-1, keepdims=True) @ v[:, kv_head]
        return self.project(out.reshape(n, -1), layer + "attn_output")

    def feed_forward(self, x, layer):
        gate = self.project(x, layer + "ffn_gate")
        return self.project(gate / (1 + np.exp(-gate)) * self.project(x, layer + "ffn_up"), layer + "ffn_down")

    def log_probs(self, tokens, first_row=0):
        """Log-probabilities of what follows each token: [tokens - first_row, vocabulary]."""
        x = self.weights["token_embd.weight"][tokens].astype(np.float64)
        for i in range(self.n_layers):
            layer = f"blk.{i}."
            x = x + self.attention(self.norm(x, layer + "attn_norm"), layer)
            x = x + self.feed_forward(self.norm(x, layer + "ffn_norm"), layer)
        output = "output" if "output.weight" in self.weights else "token_embd"
        return log_softmax(self.project(self.norm(x[first_row:], "output_norm"), output))


def log_softmax(logits):
    """Of rows of logits, in double precision."""
    shifted = logits - logits.max(axis=-1, keepdims=True).astype(np.float64)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
