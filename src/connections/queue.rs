//! What a listener's accept queue is asked, and the operating system about it.

use std::{any::Any, future, io, pin::pin, task::Poll};

use axum::serve::Listener;
use tokio::{
    net::{TcpListener, TcpStream},
    task,
};

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
/// A `TcpListener` is asked directly: the runtime knows of a connection only since it last asked
/// for news, and a busy runtime may not have done so for milliseconds. Any other listener cannot be
/// asked, and is just closed.
pub(super) fn last_ones<L: Listener>(listener: L) -> Vec<(L::Io, L::Addr)> {
    /// More than a queue holds, where nothing stops it from being filled.
    const MOST: usize = 4096;

    let tcp = cast::<L, TcpListener>(listener).and_then(|tcp| tcp.into_std().ok());
    let Some(tcp) = tcp else {
        return Vec::new();
    };
    let mut last = Vec::new();
    // Whoever made the socket, or shares it, may have made it blocking.
    if tcp.set_nonblocking(true).is_ok() {
        while last.len() < MOST {
            match tcp.accept() {
                Ok(accepted) => last.push(accepted),
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(_) => break,
            }
        }
    }
    let_in_handshakes(&tcp);
    drop(tcp);
    let connections = last.into_iter().rev().filter_map(|(stream, addr)| {
        stream.set_nonblocking(true).ok()?;
        let stream = TcpStream::from_std(stream).ok()?;
        Some((cast(stream)?, cast(addr)?))
    });
    connections.collect()
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
