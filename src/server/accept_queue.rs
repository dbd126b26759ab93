//! Reading the accept queue of a listener, and the socket filter that keeps new connections out of it.

use std::{any::Any, future, io, pin::pin, sync::Arc, task::Poll};

use axum::serve::Listener;
#[cfg(any(target_os = "linux", target_os = "android"))]
use socket2::SockRef;
#[cfg(unix)]
use tokio::net::{UnixListener, UnixStream, unix};
use tokio::{
    net::{TcpListener, TcpStream},
    task,
};

#[cfg(any(target_os = "linux", target_os = "android"))]
use super::activation;
use super::socket::take;
use crate::connection::descriptors::{MOST, Passed, Socket, SocketKind, is_out_of_descriptors};

/// Whether the accept queue of this listener can be emptied: it is a `TcpListener` or `UnixListener`
/// of tokio.
pub(super) fn can_empty_queue(listener: &dyn Any) -> bool {
    #[cfg(unix)]
    if listener.is::<UnixListener>() {
        return true;
    }
    listener.is::<TcpListener>()
}

/// Accepts a connection that is in the queue now. Returns `None` if there is none, as far as the runtime
/// knows.
pub(super) async fn queued<L: Listener>(listener: &mut L) -> Option<(L::Io, L::Addr)> {
    let mut accept = pin!(listener.accept());
    for look in 0..4 {
        if look > 0 {
            // Lets the runtime poll the operating system for new connections.
            task::yield_now().await;
        }
        let accepted = future::poll_fn(|cx| Poll::Ready(accept.as_mut().poll(cx))).await;
        if let Poll::Ready(accepted) = accepted {
            return Some(accepted);
        }
    }
    None
}

/// Removes the listener from the runtime and returns its socket, if it is a listener of tokio. Any
/// other listener is closed. An error means that the socket is closed, and what was queued is reset, unless
/// another process has the socket.
///
/// `accept` on the socket finds every queued connection. The runtime knows only the connections that
/// were queued when it last polled the operating system, which a busy runtime may not have done for
/// milliseconds.
pub(super) fn into_socket<L: Listener>(listener: L, is_passed: bool) -> io::Result<Option<Socket>> {
    let listener: Box<dyn Any> = Box::new(listener);
    // Another process that shares the socket may have made it blocking.
    let kind = match listener.downcast::<TcpListener>() {
        Ok(tcp) => {
            let tcp = tcp.into_std()?;
            tcp.set_nonblocking(true)?;
            SocketKind::Tcp(tcp)
        }
        #[cfg(unix)]
        Err(other) => {
            let Ok(unix) = other.downcast::<UnixListener>() else {
                return Ok(None);
            };
            let unix = unix.into_std()?;
            unix.set_nonblocking(true)?;
            SocketKind::Unix(unix)
        }
        #[cfg(not(unix))]
        Err(_) => return Ok(None),
    };
    Ok(Some(Socket { kind, is_passed }))
}

/// The connections of an accept queue.
pub(super) struct Queued<A> {
    /// The latest first.
    pub(super) accepted: Vec<A>,
    /// The number of connections that were accepted, but reset because the runtime did not take them.
    pub(super) reset: usize,
    /// The process had no file descriptors left for the rest of the queue.
    pub(super) is_starved: bool,
    /// Another error, after which the rest of the queue is not accepted.
    pub(super) error: Option<io::Error>,
}

impl<A> Queued<A> {
    /// As many were accepted as at one time may be, so there may be more.
    pub(super) fn is_full(&self) -> bool {
        self.accepted.len() + self.reset >= MOST
    }
}

/// Accepts all connections that are queued.
pub(super) fn accept_all<A: 'static>(socket: &Socket) -> Queued<A> {
    match &socket.kind {
        SocketKind::Tcp(tcp) => queue(|| {
            let (stream, addr) = tcp.accept()?;
            let ready = stream.set_nonblocking(true);
            let stream = ready.and_then(|()| TcpStream::from_std(stream));
            Ok(stream.ok().and_then(|it| take(&mut Some((it, addr)))))
        }),
        #[cfg(unix)]
        SocketKind::Unix(unix) => queue(|| {
            let (stream, addr) = unix.accept()?;
            let ready = stream.set_nonblocking(true);
            let stream = ready.and_then(|()| UnixStream::from_std(stream));
            let addr = unix::SocketAddr::from(addr);
            Ok(stream.ok().and_then(|it| take(&mut Some((it, addr)))))
        }),
    }
}

/// Calls `accept` until the queue is empty. `accept` returns `None` for a connection that has failed.
fn queue<A>(accept: impl Fn() -> io::Result<Option<A>>) -> Queued<A> {
    let mut queued = Queued {
        accepted: Vec::new(),
        reset: 0,
        is_starved: false,
        error: None,
    };
    while !queued.is_full() {
        match accept() {
            Ok(Some(connection)) => queued.accepted.push(connection),
            Ok(None) => queued.reset += 1,
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if is_out_of_descriptors(&error) => {
                queued.is_starved = true;
                break;
            }
            Err(error) => {
                queued.error = Some(error);
                break;
            }
        }
    }
    queued.accepted.reverse();
    queued
}

/// Attaches a socket filter with which the kernel drops every packet that begins a new connection to
/// this listener, and no other packet. So no connection arrives between the last `accept` and the
/// close. Returns whether the filter was attached: only for a TCP listener on Linux.
///
/// The client sends the packet again a second later, as after any lost packet. By then the listener is
/// closed, and the connection is refused.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(super) fn attach_syn_filter(listener: &dyn Any) -> bool {
    use socket2::SockFilter;

    // Classic BPF (linux/bpf_common.h), on a packet that begins with its TCP header.
    const LOAD_BYTE: u16 = 0x30;
    const JUMP_IF_SET: u16 = 0x45;
    const RETURN: u16 = 0x06;
    const FLAGS: u32 = 13;
    const SYN: u32 = 0x02;
    let filter = [
        SockFilter::new(LOAD_BYTE, 0, 0, FLAGS),
        SockFilter::new(JUMP_IF_SET, 0, 1, SYN),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
    ];
    tcp(listener).is_some_and(|tcp| tcp.attach_filter(&filter).is_ok())
}

/// Detaches the filter that `attach_syn_filter` attached, in this process or in one that was killed
/// before it could detach it. The filter belongs to the socket and not to the process: a socket that
/// is shared, or that is passed to the next process, must accept connections again.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(super) fn detach_syn_filter(listener: &dyn Any) {
    if let Some(tcp) = tcp(listener) {
        let _ = tcp.detach_filter();
    }
}

/// Detaches the filter and closes the socket, of which this is the last reference. Nothing may come in between:
/// a connection that arrives there is reset. Without the detaching none would be, but if another process
/// has the socket too, it would never get a connection again. The kernel tells no process whether another
/// one has its socket.
pub(super) fn close_filtered(socket: Arc<Socket>) {
    debug_assert_eq!(Arc::strong_count(&socket), 1);
    detach_syn_filter(&*socket);
    drop(socket);
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn tcp(listener: &dyn Any) -> Option<SockRef<'_>> {
    if let Some(tcp) = listener.downcast_ref::<TcpListener>() {
        return Some(SockRef::from(tcp));
    }
    match &listener.downcast_ref::<Socket>()?.kind {
        SocketKind::Tcp(tcp) => Some(SockRef::from(tcp)),
        SocketKind::Unix(_) => None,
    }
}

/// Whether the listener was passed to the process by socket activation. `No` for listeners that are not
/// tokio's, and on systems other than Linux and Android.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(super) fn passed(listener: &dyn Any) -> Passed {
    if let Some(tcp) = listener.downcast_ref::<TcpListener>() {
        return activation::find(tcp);
    }
    let unix = listener.downcast_ref::<UnixListener>();
    unix.map_or(Passed::No, activation::find)
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(super) fn attach_syn_filter(_: &dyn Any) -> bool {
    false
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(super) fn detach_syn_filter(_: &dyn Any) {}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(super) fn passed(_: &dyn Any) -> Passed {
    Passed::No
}

#[cfg(test)]
mod tests {
    use std::{
        net::{SocketAddr, TcpStream},
        sync::atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    #[tokio::test]
    async fn connections_queued_at_the_close_of_a_tcp_listener_are_accepted() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let clients = [(); 3].map(|()| TcpStream::connect(address).unwrap());
        let socket = into_socket(listener, false).unwrap().unwrap();
        let queued = accept_all::<(tokio::net::TcpStream, SocketAddr)>(&socket);
        assert!(!queued.is_starved);
        // The latest comes first, because the listener takes connections from the end.
        let ports: Vec<_> = queued
            .accepted
            .iter()
            .rev()
            .map(|(_, peer)| peer.port())
            .collect();
        let expected = clients.map(|client| client.local_addr().unwrap().port());
        assert_eq!(ports, expected);
        drop(socket);
        assert!(TcpStream::connect(address).is_err());
    }

    #[test]
    fn connections_that_the_runtime_does_not_take_are_counted() {
        let results = [
            Ok(Some('a')),
            Ok(None),
            Err(io::ErrorKind::ConnectionAborted.into()),
            Ok(Some('b')),
            Err(io::ErrorKind::WouldBlock.into()),
        ];
        let results = std::cell::RefCell::new(results.into_iter());
        let queued = queue(|| results.borrow_mut().next().unwrap());
        assert_eq!(queued.accepted, ['b', 'a']);
        assert_eq!(queued.reset, 1);
        assert!(!queued.is_starved && !queued.is_full());
    }

    #[test]
    fn a_long_queue_is_accepted_in_parts() {
        let queued = queue(|| Ok(Some(())));
        assert_eq!(queued.accepted.len(), MOST);
        assert!(queued.is_full());
        let failed = queue::<()>(|| Ok(None));
        assert_eq!(failed.reset, MOST);
        assert!(failed.is_full());
    }

    #[cfg(unix)]
    #[test]
    fn a_queue_ends_with_its_first_error() {
        const EMFILE: i32 = 24;
        for (error, is_starved, is_error) in [
            (io::ErrorKind::WouldBlock.into(), false, false),
            (io::Error::from_raw_os_error(EMFILE), true, false),
            (io::Error::other("unknown"), false, true),
        ] {
            let error = std::cell::Cell::new(Some(error));
            let queued = queue::<()>(|| Err(error.take().unwrap()));
            assert_eq!(queued.is_starved, is_starved);
            assert_eq!(queued.error.is_some(), is_error);
        }
    }

    /// Has a connection once other tasks have had so many turns.
    struct After {
        turns: Arc<AtomicUsize>,
        awaited: usize,
    }

    impl Listener for After {
        type Io = tokio::io::DuplexStream;
        type Addr = ();

        async fn accept(&mut self) -> (Self::Io, ()) {
            let turns = || self.turns.load(Ordering::Relaxed);
            future::poll_fn(|_| {
                if turns() >= self.awaited {
                    Poll::Ready(())
                } else {
                    Poll::Pending
                }
            })
            .await;
            (tokio::io::duplex(1).0, ())
        }

        fn local_addr(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn the_runtime_has_three_turns_to_find_a_connection_that_is_queued() {
        for (awaited, is_found, expected) in [(0, true, 0), (3, true, 3), (4, false, 3)] {
            let turns = Arc::new(AtomicUsize::new(0));
            let counted = Arc::clone(&turns);
            let others = tokio::spawn(async move {
                loop {
                    counted.fetch_add(1, Ordering::Relaxed);
                    task::yield_now().await;
                }
            });
            let mut listener = After {
                turns: Arc::clone(&turns),
                awaited,
            };
            assert_eq!(queued(&mut listener).await.is_some(), is_found);
            assert_eq!(turns.load(Ordering::Relaxed), expected);
            others.abort();
        }
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn connections_queued_at_the_close_of_a_unix_listener_are_accepted() {
        use std::os::unix::net::UnixStream;

        let name = format!("tower-graceful-queue-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let listener = UnixListener::bind(&path).unwrap();
        let _clients = [(); 3].map(|()| UnixStream::connect(&path).unwrap());
        let socket = into_socket(listener, false).unwrap().unwrap();
        let queued = accept_all::<(tokio::net::UnixStream, unix::SocketAddr)>(&socket);
        assert_eq!(queued.accepted.len(), 3);
        drop(socket);
        assert!(UnixStream::connect(&path).is_err());
        std::fs::remove_file(&path).unwrap();
    }
}
