/* Moves the wall clock of a program under test while it runs; its monotonic clocks go on as ever. Preloaded. It takes
 * no memory: the allocator that Envoy has linked in asks for the time before it is ready, which is where libfaketime
 * waits for ever. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* Seconds, in a file that the test writes. */
static const volatile int64_t *ahead;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("E2E_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *at = mmap(NULL, sizeof *ahead, PROT_READ, MAP_SHARED, file, 0);
    if (at == MAP_FAILED) abort(); /* Rather than a test that shows nothing. */
    close(file);
    ahead = at;
}

static int64_t moved_by(clockid_t clock) {
    return ahead && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) ? *ahead : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = (int)syscall(SYS_clock_gettime, clock, now);
    if (!failed) now->tv_sec += moved_by(clock);
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int failed = (int)syscall(SYS_gettimeofday, now, zone);
    if (!failed) now->tv_sec += moved_by(CLOCK_REALTIME);
    return failed;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
