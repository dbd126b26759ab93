//! Whether a listening socket was passed to the process by socket activation (`sd_listen_fds(3)`).
//!
//! Such a socket outlives the process: the supervisor keeps it open, and the next process accepts from
//! the same queue. A change to the socket, such as a filter, affects that process too.
//!
//! The sockets are `LISTEN_FDS` descriptors from 3 on, if `LISTEN_PID` is this process. A supervisor that
//! starts at another number says so in `LISTEN_FDS_FIRST_FD`, which the crate listenfd reads. Without
//! `LISTEN_PID`, `LISTEN_FDS` may be inherited from a parent, and descriptor 3 may be a socket that this
//! process opened. Libraries may remove the variables from the environment, and duplicate the
//! descriptors. So this module also reads the initial environment of the process, and compares sockets by inode.
//!
//! If a passed descriptor was closed or is no longer a socket, or if sockets cannot be compared, any
//! listener may be the passed one: [`Passed::Perhaps`]. Such a listener gets no filter, so a connection
//! that arrives between its last `accept` and its close is reset. It is not left to the next process at
//! the start of the stop, because there may be no next process: `LISTEN_FDS` may be inherited from a
//! process to which other sockets were passed.

use std::{
    env,
    ffi::OsString,
    fs,
    ops::Range,
    os::{
        fd::{AsRawFd, RawFd},
        unix::{
            ffi::OsStringExt,
            fs::{FileTypeExt, MetadataExt},
        },
    },
    process, str,
};

use crate::connection::descriptors::Passed;

/// The number of the first passed descriptor, if `LISTEN_FDS_FIRST_FD` gives no other.
const FIRST: RawFd = 3;

/// Whether `socket` was passed to the process when it was started. Call it early: after a descriptor is
/// closed, the system reuses its number for other files.
pub(super) fn find(socket: &impl AsRawFd) -> Passed {
    let current = passed(|name| env::var_os(name).map(OsString::into_vec));
    let initial = passed_in(&fs::read("/proc/self/environ").unwrap_or_default());
    // A program may change its environment, for itself or for a child.
    let all = [initial, current].into_iter();
    let (passed, is_named) = all
        .max_by_key(|(passed, is_named)| (passed.len(), *is_named))
        .unwrap_or_default();
    if passed.is_empty() {
        return Passed::No;
    }
    let found = among(File::open_as(socket.as_raw_fd()), passed.map(File::open_as));
    match found {
        Passed::Yes if !is_named => Passed::Perhaps,
        found => found,
    }
}

/// The descriptors that were passed to this process, from the values of the variables, and whether these
/// name this process.
fn passed(value: impl Fn(&str) -> Option<Vec<u8>>) -> (Range<RawFd>, bool) {
    let number = |name| str::from_utf8(&value(name)?).ok()?.parse::<RawFd>().ok();
    let is_named = value("LISTEN_PID").is_some();
    let is_ours = number("LISTEN_PID").is_some_and(|pid| RawFd::try_from(process::id()) == Ok(pid));
    let count = number("LISTEN_FDS").filter(|_| is_ours || !is_named);
    let first = number("LISTEN_FDS_FIRST_FD").filter(|first| *first >= 0);
    let first = first.unwrap_or(FIRST);
    (first..first.saturating_add(count.unwrap_or(0)), is_named)
}

/// The same, from an environment in the format of the kernel: `name=value` pairs, each followed by a zero
/// byte.
fn passed_in(environ: &[u8]) -> (Range<RawFd>, bool) {
    passed(|name| {
        let mut variables = environ.split(|byte| *byte == 0);
        let value = variables
            .find_map(|variable| variable.strip_prefix(name.as_bytes())?.strip_prefix(b"="))?;
        Some(value.to_vec())
    })
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
        let ours = format!("LISTEN_FDS=2\0LISTEN_PID={}\0", ours());
        assert_eq!(passed_in(b"LISTEN_FDS=2"), (3..5, false));
        assert_eq!(passed_in(ours.as_bytes()), (3..5, true));
        for environ in [
            "LISTEN_FDS=2\0LISTEN_PID=1",
            "",
            &ours["LISTEN_FDS=2".len()..],
        ] {
            assert!(passed_in(environ.as_bytes()).0.is_empty(), "{environ:?}");
        }
    }

    #[test]
    fn the_first_descriptor_may_have_another_number() {
        let from =
            |first| passed_in(format!("LISTEN_FDS=2\0LISTEN_FDS_FIRST_FD={first}").as_bytes()).0;
        assert_eq!(from("7"), 7..9);
        assert_eq!(from("x"), 3..5);
        assert_eq!(from(&RawFd::MAX.to_string()).len(), 0);
        assert_eq!(passed_in(b"LISTEN_FDS_FIRST_FD=7").0.len(), 0);
    }

    #[test]
    fn values_that_are_no_numbers_pass_nothing() {
        for value in [
            &b""[..],
            b"x",
            b"1 ",
            b"\xff",
            b"-1",
            b"99999999999999999999",
        ] {
            let fds = [b"LISTEN_FDS=", value].concat();
            let pid = [b"LISTEN_FDS=1\0LISTEN_PID=", value].concat();
            assert!(passed_in(&fds).0.is_empty(), "{value:?}");
            assert!(passed_in(&pid).0.is_empty(), "{value:?}");
        }
    }

    #[test]
    fn an_initial_environment_is_read() {
        let ours = ours();
        let environ = |pid: &str| format!("A=\0LISTEN_FDS=3\0LISTEN_PID={pid}\0B=LISTEN_FDS=4\0");
        assert_eq!(passed_in(environ(&ours).as_bytes()).0, 3..6);
        assert!(passed_in(environ("1").as_bytes()).0.is_empty());
        assert!(
            passed_in(b"XLISTEN_FDS=3\0LISTEN_FDSX=3\0LISTEN_FDS")
                .0
                .is_empty()
        );
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
