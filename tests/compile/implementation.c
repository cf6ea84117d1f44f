/* The implementation as the first include of a file, in strict ISO mode; once more is harmless. */
#define KVL_IMPLEMENTATION
#include "kvlite.h"
#include "kvlite.h"
