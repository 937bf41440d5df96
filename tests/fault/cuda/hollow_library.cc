// Built as several shared libraries that take the place of NVIDIA's: they open but hold none of the
// functions, or only those of a version that is too old.
#ifdef STRETTO_OLD_NCCL
extern "C" int ncclGetVersion(int* version) {
  *version = 21805;
  return 0;  // ncclSuccess
}
#else
extern "C" int stretto_nothing() { return 0; }
#endif
