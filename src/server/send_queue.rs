//! The number of bytes written on a TCP connection that the peer has not acknowledged, and whether the peer still
//! answers.
//!
//! A response is not delivered when its last byte has been written. The kernel may hold megabytes of
//! it, and discards them if the socket is closed and the peer sends something afterwards. Linux gives
//! the number of bytes it holds (`SIOCOUTQ`, tcp(7)) through an `ioctl`, for which there is no safe
//! function. So this module reads the same counter through `sock_diag(7)`, as `ss` does: one request
//! and one answer on a netlink socket, about 2 µs. Any user may query any socket of its network
//! namespace.
//!
//! The netlink socket is opened with the first connection, because later there may be no file
//! descriptor left for it. The number is unknown (`None`) on other operating systems, in a sandbox that
//! forbids `AF_NETLINK`, in a kernel without `tcp_diag`, and for a socket that was passed from another network
//! namespace.

use tokio::net::TcpStream;

/// What a TCP connection has sent, and its peer has not acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Queue {
    /// The number of bytes. A FIN counts as one.
    pub(super) unacknowledged: u32,
    /// How often the kernel has sent it again since the peer last acknowledged a part of it, or, if the peer has no room,
    /// how often it has probed the peer since that last answered.
    pub(super) sent_again: u8,
}

impl Queue {
    /// Whether the peer has stopped answering: its machine was suspended, or has lost its network.
    ///
    /// Linux sends again 0.2, 0.6, 1.4 and 3.0 s after the first loss, and later to a peer that is far away. It counts
    /// when it sends, so three were not answered. A peer that is alive may ignore one of the probes, because Linux
    /// answers them at most every 0.5 s.
    pub(super) fn has_vanished(self) -> bool {
        self.sent_again >= 4
    }
}

/// `None` if the kernel does not tell. Empty if the connection has ended: either both sides have closed and everything
/// is acknowledged, or the peer has reset it, or the kernel has given it up.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(super) fn queue(tcp: &TcpStream) -> Option<Queue> {
    match tcp.peer_addr() {
        Ok(peer) => match diag::ask(tcp.local_addr().ok()?, peer)? {
            // It has ended since. Or the kernel never finds it: the socket was passed from another network
            // namespace, or the kernel has no `tcp_diag`.
            diag::Answer::NotFound => tcp.peer_addr().is_err().then(Queue::default),
            diag::Answer::Found(queue) => Some(queue),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotConnected => Some(Queue::default()),
        Err(_) => None,
    }
}

/// The number of bytes that the peer has not acknowledged.
pub(super) fn unacknowledged(tcp: &TcpStream) -> Option<u32> {
    queue(tcp).map(|queue| queue.unacknowledged)
}

/// Opens the netlink socket, once for the process.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(super) fn prepare() {
    diag::prepare();
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(super) fn prepare() {}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(super) fn queue(_: &TcpStream) -> Option<Queue> {
    None
}

#[cfg(any(target_os = "linux", target_os = "android"))]
mod diag {
    use std::{
        io::{self, Read},
        net::{IpAddr, SocketAddr},
        sync::{Mutex, Once},
    };

    use socket2::{Domain, Protocol, Socket, Type};

    use super::Queue;
    use crate::sync::lock;

    // linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h
    const AF_NETLINK: i32 = 16;
    const NETLINK_SOCK_DIAG: i32 = 4;
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const NLM_F_REQUEST: u16 = 1;
    const NLMSG_ERROR: u16 = 2;
    const ENOENT: i32 = 2;
    const AF_INET: u8 = 2;
    const AF_INET6: u8 = 10;
    const IPPROTO_TCP: u8 = 6;
    const TCP_LISTEN: u8 = 10;
    /// `nlmsghdr`, then `inet_diag_req_v2` or `inet_diag_msg`.
    const HEADER: usize = 16;
    const REQUEST: usize = HEADER + 56;
    const ANSWER: usize = HEADER + 72;

    #[derive(Debug, PartialEq, Eq)]
    pub(super) enum Answer {
        NotFound,
        Found(Queue),
    }

    /// One netlink socket for the process. Each query holds the lock for about 2 µs.
    static SOCKET: Mutex<Asking> = Mutex::new(Asking {
        socket: None,
        queries: 0,
    });

    struct Asking {
        socket: Option<Socket>,
        /// The number of queries so far. It is sent with the query, and the answer repeats it.
        queries: u32,
    }

    pub(super) fn prepare() {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            lock!(SOCKET).socket = open().ok();
        });
    }

    /// `None` if the kernel cannot be asked.
    pub(super) fn ask(local: SocketAddr, peer: SocketAddr) -> Option<Answer> {
        let mut asking = lock!(SOCKET);
        // A forked process shares the socket with its parent, and each may take an answer that is meant
        // for the other. The second query is on a new socket.
        (0..2).find_map(|_| asking.ask(local, peer).ok())
    }

    impl Asking {
        /// Queries the kernel. After an error the next query opens a new socket, because a late answer may
        /// come on this one.
        fn ask(&mut self, local: SocketAddr, peer: SocketAddr) -> io::Result<Answer> {
            let socket = self.socket.take().map_or_else(open, Ok)?;
            self.queries = self.queries.wrapping_add(1);
            let answer = exchange(&socket, self.queries, local, peer)?;
            self.socket = Some(socket);
            Ok(answer)
        }
    }

    fn open() -> io::Result<Socket> {
        let socket = Socket::new(
            Domain::from(AF_NETLINK),
            Type::DGRAM,
            Some(Protocol::from(NETLINK_SOCK_DIAG)),
        )?;
        // The kernel answers before `send` returns, so the read never has to wait.
        socket.set_nonblocking(true)?;
        Ok(socket)
    }

    /// Sends a query and reads the answer.
    fn exchange(
        socket: &Socket,
        number: u32,
        local: SocketAddr,
        peer: SocketAddr,
    ) -> io::Result<Answer> {
        let request = request(number, local, peer);
        socket.send(&request)?;
        let mut answer = [0; 512];
        let read = { socket }.read(&mut answer)?;
        let answer = &answer[..read];
        if answer.get(8..12) != Some(&number.to_ne_bytes()) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if answer.get(4..6) == Some(&NLMSG_ERROR.to_ne_bytes()) {
            let error = answer.get(HEADER..HEADER + 4).map(<[u8; 4]>::try_from);
            return match error {
                Some(Ok(error)) if i32::from_ne_bytes(error) == -ENOENT => Ok(Answer::NotFound),
                _ => Err(io::ErrorKind::Other.into()),
            };
        }
        parse(answer, &request).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn request(number: u32, local: SocketAddr, peer: SocketAddr) -> [u8; REQUEST] {
        let mut request = [0; REQUEST];
        let length = u32::try_from(REQUEST).unwrap_or_default();
        put(&mut request, 0, &length.to_ne_bytes());
        put(&mut request, 4, &SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        put(&mut request, 6, &NLM_F_REQUEST.to_ne_bytes());
        put(&mut request, 8, &number.to_ne_bytes());
        let family = if local.is_ipv4() { AF_INET } else { AF_INET6 };
        put(&mut request, HEADER, &[family, IPPROTO_TCP]);
        // All states.
        put(&mut request, HEADER + 4, &u32::MAX.to_ne_bytes());
        put(&mut request, HEADER + 8, &local.port().to_be_bytes());
        put(&mut request, HEADER + 10, &peer.port().to_be_bytes());
        for (address, at) in [(local, HEADER + 12), (peer, HEADER + 28)] {
            match address.ip() {
                IpAddr::V4(ip) => put(&mut request, at, &ip.octets()),
                IpAddr::V6(ip) => put(&mut request, at, &ip.octets()),
            }
        }
        if let SocketAddr::V6(local) = local {
            // A link-local address is unique only together with its interface.
            put(&mut request, HEADER + 44, &local.scope_id().to_ne_bytes());
        }
        // No cookie.
        put(&mut request, HEADER + 48, &[0xff; 8]);
        request
    }

    fn put(message: &mut [u8], at: usize, bytes: &[u8]) {
        message[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// The send queue, if this is the answer to the request. In place of a connection that it does not
    /// find, the kernel may answer with a listener on the same port.
    fn parse(answer: &[u8], request: &[u8; REQUEST]) -> Option<Answer> {
        /// Ports and addresses, in the answer and in the request.
        const ENDS: (std::ops::Range<usize>, std::ops::Range<usize>) =
            (HEADER + 4..HEADER + 40, HEADER + 8..HEADER + 44);
        const STATE: usize = HEADER + 1;
        /// The timer that runs, and its count.
        const TIMER: usize = HEADER + 2;
        const COUNT: usize = HEADER + 3;
        /// The retransmission, and the probe of a peer that has no room.
        const TIMERS: [u8; 2] = [1, 4];
        const SEND_QUEUE: std::ops::Range<usize> = HEADER + 60..HEADER + 64;

        if answer.len() < ANSWER || answer[4..6] != SOCK_DIAG_BY_FAMILY.to_ne_bytes() {
            return None;
        }
        if answer[STATE] == TCP_LISTEN {
            return Some(Answer::NotFound);
        }
        let counts = TIMERS.contains(&answer[TIMER]);
        let queue = Queue {
            unacknowledged: u32::from_ne_bytes(answer[SEND_QUEUE].try_into().ok()?),
            sent_again: if counts { answer[COUNT] } else { 0 },
        };
        (answer[ENDS.0] == request[ENDS.1]).then_some(Answer::Found(queue))
    }

    #[cfg(test)]
    mod tests {
        use std::{
            io::Write,
            net::{Shutdown, TcpListener, TcpStream},
            time::{Duration, Instant},
        };

        use super::*;

        fn pair(listen: &str, connect: &str) -> (TcpStream, TcpStream) {
            let listener = TcpListener::bind((listen, 0)).unwrap();
            let port = listener.local_addr().unwrap().port();
            let client = TcpStream::connect((connect, port)).unwrap();
            (listener.accept().unwrap().0, client)
        }

        fn queue(tcp: &TcpStream) -> Option<u32> {
            match ask(tcp.local_addr().unwrap(), tcp.peer_addr().unwrap())? {
                Answer::NotFound => None,
                Answer::Found(queue) => Some(queue.unacknowledged),
            }
        }

        fn becomes(tcp: &TcpStream, expected: impl Fn(Option<u32>) -> bool) {
            let deadline = Instant::now() + Duration::from_secs(20);
            while !expected(queue(tcp)) {
                assert!(Instant::now() < deadline, "{:?}", queue(tcp));
                std::thread::yield_now();
            }
        }

        #[test]
        fn what_the_peer_has_not_taken_is_known() {
            for (listen, connect) in [("127.0.0.1", "127.0.0.1"), ("::", "127.0.0.1")] {
                let (mut server, mut client) = pair(listen, connect);
                assert_eq!(queue(&server), Some(0), "{listen}");
                server.set_nonblocking(true).unwrap();
                let mut written = 0;
                while let Ok(more) = server.write(&[0; 8192]) {
                    written += more;
                }
                assert!(queue(&server) > Some(100_000), "{listen}");
                server.shutdown(Shutdown::Write).unwrap();
                let mut rest = vec![0; written];
                client.read_exact(&mut rest).unwrap();
                becomes(&server, |queue| queue == Some(0));
            }
        }

        /// The two processes of a fork share the socket.
        #[test]
        fn an_answer_to_a_query_of_another_process_is_not_taken() {
            let (mut server, _client) = pair("127.0.0.1", "127.0.0.1");
            server.write_all(b"unread").unwrap();
            let (other, _other) = pair("127.0.0.1", "127.0.0.1");
            for after in [0, 1] {
                let mut asking = lock!(SOCKET);
                let number = asking.queries.wrapping_add(after);
                let local = other.local_addr().unwrap();
                let theirs = request(number, local, other.peer_addr().unwrap());
                let socket = asking.socket.get_or_insert_with(|| open().unwrap());
                socket.send(&theirs).unwrap();
                let (local, peer) = (server.local_addr().unwrap(), server.peer_addr().unwrap());
                assert!(asking.ask(local, peer).is_err());
                drop(asking);
                becomes(&server, |queue| queue.is_some());
            }
        }

        #[test]
        fn a_connection_that_is_gone_is_not_taken_for_its_listener() {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let local = listener.local_addr().unwrap();
            let client = TcpStream::connect(local).unwrap();
            let peer = client.local_addr().unwrap();
            let (server, _) = listener.accept().unwrap();
            let linger = socket2::SockRef::from(&server);
            linger.set_linger(Some(Duration::ZERO)).unwrap();
            drop(server);
            assert_eq!(ask(local, peer), Some(Answer::NotFound));
        }
    }
}
