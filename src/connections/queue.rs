//! What a listener's accept queue is asked, and the operating system about it.

use std::{any::Any, future, io, pin::pin, task::Poll};

use axum::serve::Listener;
#[cfg(unix)]
use tokio::net::{UnixListener, UnixStream, unix};
use tokio::{
    net::{TcpListener, TcpStream},
    task,
};

use crate::events;

/// Whether it is a listener whose queue can be asked: one of tokio's.
pub(super) fn is_asked(listener: &dyn Any) -> bool {
    #[cfg(unix)]
    if listener.is::<UnixListener>() {
        return true;
    }
    listener.is::<TcpListener>()
}

/// A connection that is in the accept queue now.
pub(super) async fn queued<L: Listener>(listener: &mut L) -> Option<(L::Io, L::Addr)> {
    let mut accept = pin!(listener.accept());
    for look in 0..4 {
        if look > 0 {
            // The runtime asks the operating system for news before it goes on here.
            task::yield_now().await;
        }
        let accepted = future::poll_fn(|cx| Poll::Ready(accept.as_mut().poll(cx))).await;
        if let Poll::Ready(accepted) = accepted {
            return Some(accepted);
        }
    }
    None
}

/// Closes the listener, and returns whom the operating system had queued to the very last.
///
/// A listener of tokio's is asked directly: the runtime knows of a connection only since it last
/// asked for news, and a busy runtime may not have done so for milliseconds. Any other listener
/// cannot be asked, and is just closed.
pub(super) fn last_ones<L: Listener>(listener: L) -> Vec<(L::Io, L::Addr)> {
    let listener: Box<dyn Any> = Box::new(listener);
    let listener = match listener.downcast::<TcpListener>() {
        Ok(tcp) => return last_of_tcp(*tcp),
        Err(other) => other,
    };
    #[cfg(unix)]
    let listener = match listener.downcast::<UnixListener>() {
        Ok(unix) => return last_of_unix(*unix),
        Err(other) => other,
    };
    drop(listener);
    Vec::new()
}

fn last_of_tcp<A: 'static>(listener: TcpListener) -> Vec<A> {
    let Ok(tcp) = listener.into_std() else {
        return Vec::new();
    };
    let last = queue(tcp.set_nonblocking(true).is_ok(), || tcp.accept());
    let_in_handshakes(&tcp);
    drop(tcp);
    let connections = last.into_iter().filter_map(|(stream, addr)| {
        stream.set_nonblocking(true).ok()?;
        cast((TcpStream::from_std(stream).ok()?, addr))
    });
    connections.collect()
}

#[cfg(unix)]
fn last_of_unix<A: 'static>(listener: UnixListener) -> Vec<A> {
    let Ok(unix) = listener.into_std() else {
        return Vec::new();
    };
    let last = queue(unix.set_nonblocking(true).is_ok(), || unix.accept());
    drop(unix);
    let connections = last.into_iter().filter_map(|(stream, addr)| {
        stream.set_nonblocking(true).ok()?;
        let addr = unix::SocketAddr::from(addr);
        cast((UnixStream::from_std(stream).ok()?, addr))
    });
    connections.collect()
}

/// All that can be accepted without waiting, the latest first.
///
/// The socket must have been made nonblocking, since whoever made it, or shares it, may have made
/// it blocking.
fn queue<A>(nonblocking: bool, accept: impl Fn() -> io::Result<A>) -> Vec<A> {
    /// More than a queue holds, where nothing stops it from being filled.
    const MOST: usize = 4096;

    let mut last = Vec::new();
    while nonblocking && last.len() < MOST {
        match accept() {
            Ok(accepted) => last.push(accepted),
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => {
                events::queue_lost(&error);
                break;
            }
        }
    }
    last.reverse();
    last
}

/// Has the kernel drop what would begin a new connection to this listener, and nothing else, so
/// that nobody slips in between the last look into the queue and the close. Says whether it does:
/// only for a `TcpListener`, on Linux.
///
/// The client tries again a second later, as after any lost packet, and is refused then.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(super) fn turn_away_handshakes(listener: &dyn Any) -> bool {
    use socket2::{SockFilter, SockRef};

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
    listener
        .downcast_ref::<TcpListener>()
        .is_some_and(|tcp| SockRef::from(tcp).attach_filter(&filter).is_ok())
}

/// Takes back what `turn_away_handshakes` did. The filter is the socket's and not ours alone: a
/// socket that a supervisor passed on, or another process shares, must accept again after us.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(super) fn let_in_handshakes(listener: &dyn Any) {
    use socket2::SockRef;

    let socket = listener.downcast_ref::<TcpListener>().map(SockRef::from);
    let closing = || {
        listener
            .downcast_ref::<std::net::TcpListener>()
            .map(SockRef::from)
    };
    if let Some(socket) = socket.or_else(closing) {
        let _ = socket.detach_filter();
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(super) fn turn_away_handshakes(_: &dyn Any) -> bool {
    false
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(super) fn let_in_handshakes(_: &dyn Any) {}

/// The value as a `B`, if that is what it is.
fn cast<A: 'static, B: 'static>(value: A) -> Option<B> {
    let mut value = Some(value);
    let value: &mut dyn Any = &mut value;
    value.downcast_mut::<Option<B>>()?.take()
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    #[tokio::test]
    async fn the_last_ones_of_a_closed_tcp_listener_are_known() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let clients = [(); 3].map(|()| TcpStream::connect(address).unwrap());
        // The latest first, because they are taken from the end.
        let last = last_ones(listener).into_iter().rev();
        let ports: Vec<_> = last.map(|(_, peer)| peer.port()).collect();
        let expected = clients.map(|client| client.local_addr().unwrap().port());
        assert_eq!(ports, expected);
        assert!(TcpStream::connect(address).is_err());
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn the_last_ones_of_a_closed_unix_listener_are_known() {
        use std::os::unix::net::UnixStream;

        let name = format!("tower-graceful-queue-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let listener = UnixListener::bind(&path).unwrap();
        let _clients = [(); 3].map(|()| UnixStream::connect(&path).unwrap());
        assert_eq!(last_ones(listener).len(), 3);
        assert!(UnixStream::connect(&path).is_err());
        std::fs::remove_file(&path).unwrap();
    }
}
