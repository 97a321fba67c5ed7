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

/// Unmaps code and constants that only starting up or a renewal needed: resident memory then shows the working
/// set, and what runs is mapped again from the page cache at the price of some dozen minor faults.
pub fn forget_rare_code() {
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return };
    for (start, length) in maps.lines().filter_map(immutable_mapping) {
        // SAFETY: these are private mappings of code and constants that nothing ever writes (what is relocated
        // lies in the writable segment, also where it is read-only by now), so dropping their pages loses
        // nothing: the next access reads the same file again.
        unsafe {
            libc::madvise(std::ptr::with_exposed_provenance_mut(start), length, libc::MADV_DONTNEED);
        }
    }
}

/// Start and length of a line of /proc/self/maps that maps code of a file, or the constants at its beginning:
/// the first segment of an ELF file is never relocated.
fn immutable_mapping(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let (permissions, offset) = (fields.next()?, fields.next()?);
    let immutable = permissions == "r-xp" || permissions == "r--p" && offset == "00000000";
    let of_a_file = fields.nth(2)?.starts_with('/');
    let start = usize::from_str_radix(start, 16).ok()?;
    let end = usize::from_str_radix(end, 16).ok()?;
    (immutable && of_a_file).then_some((start, end - start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nobody_ever_writes_is_forgotten() {
        for forgotten in [
            "55d0-56d0 r-xp 00001000 fe:00 42                  /usr/bin/meshd",
            "55d0-56d0 r--p 00000000 fe:00 42                  /usr/bin/meshd",
        ] {
            assert_eq!(immutable_mapping(forgotten), Some((0x55d0, 0x100)), "{forgotten}");
        }
        for other in [
            "55d0-56d0 r--p 00001000 fe:00 42                  /usr/bin/meshd",
            "55d0-56d0 rw-p 00001000 fe:00 42                  /usr/bin/meshd",
            "7ffe-7fff r-xp 00000000 00:00 0                   [vdso]",
            "55d0-56d0 r-xp 00000000 00:00 0",
            "",
        ] {
            assert_eq!(immutable_mapping(other), None, "{other}");
        }
    }

    #[test]
    fn the_program_goes_on_after_forgetting() {
        forget_rare_code();
        assert_eq!("still here".len(), 10);
    }
}
