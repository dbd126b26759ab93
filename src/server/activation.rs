//! Whether a listening socket was passed to the process by socket activation (`sd_listen_fds(3)`).
//!
//! Such a socket outlives the process: the supervisor keeps it open, and the next process accepts from
//! the same queue. A change to the socket, such as a filter, affects that process too.
//!
//! The sockets are descriptors 3 up to 3 + `LISTEN_FDS`, if `LISTEN_PID` is this process. Without
//! `LISTEN_PID`, `LISTEN_FDS` may be inherited from a parent, and descriptor 3 may be a socket that this
//! process opened. Libraries may remove both variables from the environment, and duplicate the
//! descriptors. So this module also reads the initial environment of the process, and compares sockets by inode.
//!
//! If a passed descriptor was closed or is no longer a socket, or if sockets cannot be compared, any
//! listener may be the passed one: [`Passed::Perhaps`]. Such a listener gets no filter, so a connection
//! that arrives between its last `accept` and its close is reset. It is not left to the next process at
//! the start of the stop, because there may be no next process: `LISTEN_FDS` may be inherited from a
//! process to which other sockets were passed.

use std::{
    env, fs,
    os::{
        fd::{AsRawFd, RawFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, MetadataExt},
        },
    },
    process, str,
};

use crate::connection::descriptors::Passed;

/// The number of the first passed descriptor.
const FIRST: RawFd = 3;

/// Whether `socket` was passed to the process when it was started. Call it early: after a descriptor is
/// closed, the system reuses its number for other files.
pub(super) fn find(socket: &impl AsRawFd) -> Passed {
    let current = ["LISTEN_FDS", "LISTEN_PID"].map(env::var_os);
    let [fds, pid] = current.each_ref().map(|value| {
        let value = value.as_ref();
        value.map(|value| value.as_bytes())
    });
    let initial = fs::read("/proc/self/environ").unwrap_or_default();
    let (passed, is_named) = passed(fds, pid).max(passed_in(&initial));
    if passed <= 0 {
        return Passed::No;
    }
    let end = FIRST.saturating_add(passed);
    let found = among(
        File::open_as(socket.as_raw_fd()),
        (FIRST..end).map(File::open_as),
    );
    match found {
        Passed::Yes if !is_named => Passed::Perhaps,
        found => found,
    }
}

/// The number of sockets that were passed to this process, from the values of the two variables, and
/// whether they name this process.
fn passed(fds: Option<&[u8]>, pid: Option<&[u8]>) -> (RawFd, bool) {
    let number = |value: &[u8]| str::from_utf8(value).ok()?.parse::<RawFd>().ok();
    let ours = RawFd::try_from(process::id()).ok();
    match pid {
        Some(pid) if number(pid).is_none() || number(pid) != ours => (0, false),
        _ => (fds.and_then(number).unwrap_or(0), pid.is_some()),
    }
}

/// The number of sockets that were passed to this process, from an environment in the format of the
/// kernel: `name=value` pairs, each followed by a zero byte.
fn passed_in(environ: &[u8]) -> (RawFd, bool) {
    let value = |name: &[u8]| {
        let mut variables = environ.split(|byte| *byte == 0);
        variables.find_map(|variable| variable.strip_prefix(name)?.strip_prefix(b"="))
    };
    passed(value(b"LISTEN_FDS"), value(b"LISTEN_PID"))
}

/// The file that a descriptor refers to.
#[derive(Clone, Copy, Debug)]
struct File {
    device: u64,
    inode: u64,
    is_socket: bool,
}

impl File {
    fn open_as(fd: RawFd) -> Option<Self> {
        let file = fs::metadata(format!("/proc/self/fd/{fd}")).ok()?;
        Some(Self {
            device: file.dev(),
            inode: file.ino(),
            is_socket: file.file_type().is_socket(),
        })
    }

    fn is(self, other: Self) -> bool {
        self.device == other.device && self.inode == other.inode
    }
}

/// Whether `socket` is one of the `passed` files. `None` is a descriptor that cannot be inspected. Stops
/// at the first descriptor that is not an open socket: if the count is too high, the later descriptors
/// belong to the process itself, and its own listeners may be among them.
fn among(socket: Option<File>, passed: impl Iterator<Item = Option<File>>) -> Passed {
    let Some(socket) = socket else {
        return Passed::Perhaps;
    };
    for file in passed {
        match file {
            Some(file) if file.is(socket) => return Passed::Yes,
            Some(file) if file.is_socket => {}
            _ => return Passed::Perhaps,
        }
    }
    Passed::No
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn ours() -> String {
        process::id().to_string()
    }

    #[test]
    fn sockets_are_passed_to_this_process_or_to_an_unnamed_one() {
        let ours = ours();
        assert_eq!(passed(Some(b"2"), None), (2, false));
        assert_eq!(passed(Some(b"2"), Some(ours.as_bytes())), (2, true));
        assert_eq!(passed(Some(b"2"), Some(b"1")), (0, false));
        assert_eq!(passed(None, None).0, 0);
        assert_eq!(passed(None, Some(ours.as_bytes())).0, 0);
    }

    #[test]
    fn values_that_are_no_numbers_pass_nothing() {
        for value in [&b""[..], b"x", b"1 ", b"\xff", b"99999999999999999999"] {
            assert_eq!(passed(Some(value), None).0, 0, "{value:?}");
            assert_eq!(passed(Some(b"1"), Some(value)).0, 0, "{value:?}");
        }
    }

    #[test]
    fn an_initial_environment_is_read() {
        let ours = ours();
        let environ = |pid: &str| format!("A=\0LISTEN_FDS=3\0LISTEN_PID={pid}\0B=LISTEN_FDS=4\0");
        assert_eq!(passed_in(environ(&ours).as_bytes()).0, 3);
        assert_eq!(passed_in(environ("1").as_bytes()).0, 0);
        assert_eq!(passed_in(b"XLISTEN_FDS=3\0LISTEN_FDSX=3\0LISTEN_FDS").0, 0);
        assert_eq!(passed_in(b"LISTEN_FDS=1").0, 1);
        assert_eq!(passed_in(b"").0, 0);
    }

    #[test]
    fn a_duplicate_is_the_same_socket_and_another_socket_is_not() {
        let [first, second, third] = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let duplicate = second.try_clone().unwrap();
        let [first, second, third, duplicate] = [first, second, third, duplicate]
            .each_ref()
            .map(|socket| File::open_as(socket.as_raw_fd()));
        assert_eq!(among(duplicate, [first, second].into_iter()), Passed::Yes);
        assert_eq!(among(third, [first, second].into_iter()), Passed::No);
        assert_eq!(among(third, [].into_iter()), Passed::No);
    }

    #[test]
    fn a_passed_descriptor_that_was_closed_or_reused_may_be_any_listener() {
        let [passed, ours] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let file = fs::File::open("/proc/self/environ").unwrap();
        let [passed, ours, file] =
            [passed.as_raw_fd(), ours.as_raw_fd(), file.as_raw_fd()].map(File::open_as);
        for descriptors in [[passed, None], [passed, file], [file, passed]] {
            assert_eq!(among(ours, descriptors.into_iter()), Passed::Perhaps);
        }
        assert_eq!(among(None, [passed].into_iter()), Passed::Perhaps);
        // `ours` has the number of a passed descriptor that was closed, or that never existed.
        assert_eq!(among(ours, [file, ours].into_iter()), Passed::Perhaps);
    }

    #[test]
    fn a_count_that_is_nonsense_costs_no_time() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut looks = 0;
        let passed = (FIRST..RawFd::MAX).map(|_| {
            looks += 1;
            None
        });
        let found = among(File::open_as(listener.as_raw_fd()), passed);
        assert_eq!((found, looks), (Passed::Perhaps, 1));
    }

    #[test]
    fn a_socket_that_the_process_made_was_not_passed() {
        let ours = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(find(&ours), Passed::No);
    }
}
