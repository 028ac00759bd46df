// Requests to Callgrind, for benchmarks/counted_calls.py. Outside of Valgrind they do nothing.
#include <valgrind/callgrind.h>

void begin(void) { CALLGRIND_START_INSTRUMENTATION; }
void zero(void) { CALLGRIND_ZERO_STATS; }
void write_down(const char* label) { CALLGRIND_DUMP_STATS_AT(label); }
