/* The implementation and its use in one translation unit, after other headers and after the declarations have
   been included; with -DKVL_STATIC nothing of it is visible outside. */
#include <stdio.h>
#include "kvlite.h"
#define KVL_IMPLEMENTATION
#include "kvlite.h"

int main(void) {
    const char *name = kvl_result_name(KVL_OK);
    return name && name[0] ? 0 : 1;
}
