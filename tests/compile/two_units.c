/* Uses every public function by address. functions.inc is made by test_compile.sh from the declarations:
   a line FUNCTION(name) for each. A function that is declared and not implemented fails to link. */
#include "kvlite.h"

typedef void (*function)(void);

#define FUNCTION(name) (function) name,
static const function functions[] = {
#include "functions.inc"
};

int main(void) {
    const char *name = kvl_result_name(KVL_OK);
    unsigned i;
    for (i = 0; i < sizeof functions / sizeof functions[0]; i++) {
        if (!functions[i]) {
            return 2;
        }
    }
    return name && name[0] ? 0 : 1;
}
