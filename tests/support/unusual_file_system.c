// LD_PRELOAD: a file system without hard links (LINK_ERRNO), without renameat2 (RENAME_ERRNO), or whose folders or files cannot
// be synced (SYNC_FOLDER_ERRNO, SYNC_FILE_ERRNO).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

static int refused(const char *variable) {
	const char *value = getenv(variable);
	if (!value) return 0;
	errno = atoi(value);
	return 1;
}

int link(const char *from, const char *to) {
	if (refused("LINK_ERRNO")) return -1;
	return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "link"))(from, to);
}

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
	if (refused("LINK_ERRNO")) return -1;
	return ((int (*)(int, const char *, int, const char *, int))dlsym(RTLD_NEXT, "linkat"))(from_folder, from, to_folder, to, flags);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
	if (refused("RENAME_ERRNO")) return -1;
	return ((int (*)(int, const char *, int, const char *, unsigned))dlsym(RTLD_NEXT, "renameat2"))(from_folder, from, to_folder, to, flags);
}

int fsync(int fd) {
	struct stat state;
	if (fstat(fd, &state) == 0 && refused(S_ISDIR(state.st_mode) ? "SYNC_FOLDER_ERRNO" : "SYNC_FILE_ERRNO")) return -1;
	return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}

int statvfs(const char *path, struct statvfs *state) {
	if (getenv("NO_SIZES")) {
		*state = (struct statvfs){.f_bsize = 4096, .f_namemax = 255};
		return 0;
	}
	return ((int (*)(const char *, struct statvfs *))dlsym(RTLD_NEXT, "statvfs"))(path, state);
}
