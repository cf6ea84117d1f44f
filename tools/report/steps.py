"""What `make report` measures: one Step for each results file."""

from dataclasses import dataclass, field

MODEL = "build/models/SmolLM2-135M-Instruct.Q4_1.gguf"
PEERS = ("build/peers/.made", "make peers installs llama.cpp")


@dataclass
class Step:
    name: str
    what: str
    argv: list
    quick: list = field(default_factory=list)  # more arguments with QUICK=1
    peers: bool = False
    model: bool = False
    limit: int = 1200  # seconds

    def command(self, quick, data):
        argv = self.argv + (self.quick if quick else [])
        return [a.replace("DATA/", data.rstrip("/") + "/") for a in argv]

    def needs(self, data):
        """(file, what to do where it is absent)"""
        wanted = [(a.replace("DATA/", data.rstrip("/") + "/"), "DATA= names the folder of traces and texts (README)")
                  for a in self.argv if a.startswith("DATA/")]
        if self.peers:
            wanted.insert(0, PEERS)
        if self.model:
            wanted.insert(0, (MODEL, "make model fetches it"))
        return wanted


AZURE = "DATA/azure_conv_2023.csv"
MOONCAKE = "DATA/mooncake_conversation.jsonl"
WIKITEXT = "DATA/wikitext2_test.txt"
ALICE = "DATA/alice29.txt"


def trace(name, what, *options, quick=("--limit", "2000")):
    return Step(name, what, ["build/trace", *options, "--json"], quick=list(quick))


def quality(name, what, text, *options, quick):
    return Step(name, what, ["build/quality", "-m", MODEL, "-f", text, *options, "--json"], quick=quick, model=True)


def peer(name, what, program, *options, model=True):
    return Step(name, what, [f"build/{program}", *options, "--json", "-"], quick=["--quick"], peers=True, model=model)


STEPS = [
    Step("bench-core", "bookkeeping, sealing, capacity", ["build/bench_core", "--json", "-"]),
    trace("trace-azure-f16", "Azure conversations, F16, ways of batching", "--trace", AZURE, "--kv", "f16", "--mode", "all"),
    trace("trace-azure-int4", "the same with int4 KV", "--trace", AZURE, "--kv", "int4"),
    trace("trace-azure-steady", "gaps at a load that the device can carry", "--trace", AZURE, "--speed", "0.25"),
    trace("trace-azure-whole", "the same without chunking", "--trace", AZURE, "--speed", "0.25", "--no-chunking"),
    trace("trace-mooncake", "Mooncake conversations, ways of batching", "--trace", MOONCAKE, "--mode", "all", quick=("--limit", "500")),
    trace("trace-sweep", "prefix hits against cache size", "--trace", MOONCAKE, "--speed", "inf", "--limit", "4000",
          "--sweep", "8G,32G,64G,128G,256G,512G,1024G", quick=("--limit", "500")),
    trace("trace-23x", "13B model, 40 GB card, exponential lengths", "--synthetic", "1000:512:128:1536", "--model", "OPT-13B", "--cost", "a100",
          "--kv", "f16", "--max-gap-ms", "0", "--mode", "all", quick=()),
    trace("trace-23x-even", "the same with even lengths", "--synthetic", "1000:512:0:1536", "--model", "OPT-13B", "--cost", "a100",
          "--kv", "f16", "--max-gap-ms", "0", "--mode", "all", quick=()),
    trace("trace-million", "a million requests", "--trace", AZURE, "--repeat", "52", quick=("--limit", "500")),
    quality("quality-wikitext", "every preset, WikiText-2, 8 chunks of 1,024", WIKITEXT, "--chunks", "8",
            quick=["--chunks", "1", "--ctx", "512"]),
    quality("quality-alice", "a second text", ALICE, "--chunks", "2", "--whole", quick=["--chunks", "1", "--ctx", "512"]),
    quality("quality-4096", "contexts of 4,096", WIKITEXT, "--ctx", "4096", "--chunks", "1", "--whole", quick=["--ctx", "512"]),
    quality("quality-retrieval", "facts in a long context", ALICE, "--retrieval", quick=["--ctx", "768"]),
    peer("peer-attention", "attention, beside ggml", "bench_peer_attention", "--rounds", "3", model=False),
    peer("peer-llm", "a model end to end, beside llama.cpp", "bench_peer_llm", "-m", MODEL, "-f", ALICE),
    peer("peer-quality", "llama.cpp's cache formats", "bench_peer_quality", "-m", MODEL, "-f", WIKITEXT),
    Step("bench-vulkan", "Vulkan, on the device that there is", ["build/bench_vulkan", "--json", "-"], quick=["--quick"]),
    Step("demo", "eight conversations", ["build/demo", "-m", MODEL, "--json"], quick=["--quick"], model=True),
]
