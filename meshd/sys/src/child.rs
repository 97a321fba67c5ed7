//! Programs that are started with less than this process may.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// It begins without capabilities (unless it runs as root), can gain none by set-user-ID programs, and ends with the thread
/// that started it.
pub fn without_privileges(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec the closure calls prctl(2) and nothing else, which is a plain system call without locks
    // or allocation; it refers to nothing of this process.
    unsafe { command.pre_exec(give_up) }
}

fn give_up() -> io::Result<()> {
    let calls = [
        (libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong),
        (libc::PR_SET_NO_NEW_PRIVS, 1),
        (libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong),
    ];
    for (option, value) in calls {
        // SAFETY: all arguments are plain numbers.
        if unsafe { libc::prctl(option, value, 0 as libc::c_ulong, 0 as libc::c_ulong, 0 as libc::c_ulong) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_started_so_can_gain_no_privileges_and_has_no_ambient_capabilities() {
        let output = without_privileges(Command::new("cat").arg("/proc/self/status")).output().unwrap();
        let status = String::from_utf8(output.stdout).unwrap();
        assert!(status.contains("NoNewPrivs:\t1\n"), "{status}");
        assert!(status.contains("CapAmb:\t0000000000000000\n"), "{status}");
    }
}
