/* peer.h - llama.cpp's and ggml's headers beside this project's: both have a gguf.h. */
#ifndef PEER_H
#define PEER_H

#define gguf_type peer_gguf_type
#define gguf_type_name peer_gguf_type_name
#include <ggml-cpu.h>
#include <ggml.h>
#include <llama.h>
#undef gguf_type
#undef gguf_type_name

#endif /* PEER_H */
