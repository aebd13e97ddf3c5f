/* A file system that lacks something, for tests/test_place.py: preloaded, it answers for paths that
 * hold $MOUNT, as $LACKS says.
 *   rename  a folder cannot be renamed: what gcsfuse says of a bucket without folders
 *   copy    its rename succeeds and leaves the old one there
 *   append  a file cannot be opened to append
 *   keep    opening a file to append empties it: each write is a new object
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static int lacks(const char *path, const char *what) {
  const char *mount = getenv("MOUNT"), *lacking = getenv("LACKS");
  return mount && lacking && !strcmp(lacking, what) && strstr(path, mount);
}

static int renamed(const char *from, const char *to, int (*rename_file)(const char *, const char *)) {
  struct stat about;
  if (stat(from, &about) || !S_ISDIR(about.st_mode)) return rename_file(from, to);
  if (lacks(from, "rename")) {
    errno = EMFILE;
    return -1;
  }
  if (lacks(from, "copy")) return mkdir(to, 0777);
  return rename_file(from, to);
}

int rename(const char *from, const char *to) {
  return renamed(from, to, dlsym(RTLD_NEXT, "rename"));
}

static int opened(const char *path, int *flags) {
  if ((*flags & O_APPEND) && lacks(path, "append")) {
    errno = EINVAL;
    return -1;
  }
  if ((*flags & O_APPEND) && lacks(path, "keep")) *flags |= O_TRUNC;
  return 0;
}

int open64(const char *path, int flags, ...) {
  int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
  va_list rest;
  va_start(rest, flags);
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return opened(path, &flags) ? -1 : real(path, flags, mode);
}

int open(const char *path, int flags, ...) {
  int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
  va_list rest;
  va_start(rest, flags);
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return opened(path, &flags) ? -1 : real(path, flags, mode);
}
