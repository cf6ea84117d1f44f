/* The declarations alone, twice, and used: what every other translation unit of an app sees. */
#include "kvlite.h"
#include "kvlite.h"

int version_of_declarations(void);
int version_of_declarations(void) { return KVL_VERSION; }
