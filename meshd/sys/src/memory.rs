//! glibc's allocator, told that memory matters more here than the last percent of malloc speed.

/// One arena per worker is enough (each worker allocates on its own thread), and freed memory goes
/// back to the kernel: glibc's default of 8 arenas per core is where "the proxy leaks" reports come from.
pub fn tune(arenas: usize) {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt only changes parameters of the allocator; it is called before worker threads start.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, arenas as libc::c_int);
        // High enough that a burst of bulk traffic does not give memory back and fault it in again per turn.
        libc::mallopt(libc::M_TRIM_THRESHOLD, 4 << 20);
        // Otherwise freeing one large block raises the threshold for good, and with it the heap.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20);
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = arenas;
}
