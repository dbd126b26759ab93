//! A TCP connection in memory, with the parts of a kernel that lose responses.
//!
//! Each side has a send buffer and a receive buffer of limited size. Bytes leave the send buffer when
//! their acknowledgement arrives. The peer's window opens when its program reads. Every segment takes
//! some time on the way, and segments of one direction do not overtake one another. A busy server learns only after
//! a while that something has arrived.
//!
//! A socket is closed as on Linux:
//!
//! - If bytes are unread when a program closes its socket, the kernel resets the connection.
//! - If bytes arrive after that, the kernel resets the connection too.
//! - A reset discards the send buffer. The peer may still read what had arrived before the reset, and
//!   then reads an error.
//! - Otherwise the FIN follows the bytes of the send buffer, which are still delivered.

use std::{
    collections::VecDeque,
    fmt, io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
    time::{Instant, sleep_until},
};

pub(crate) const SERVER: usize = 0;
pub(crate) const CLIENT: usize = 1;

/// The sizes in bytes, and the delays, of one connection.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    /// The send buffers of server and client.
    pub(crate) send: [usize; 2],
    /// The receive buffers of server and client.
    pub(crate) receive: [usize; 2],
    pub(crate) segment: usize,
    /// The longest time that a segment takes, in milliseconds.
    pub(crate) delay: u64,
    /// The times are drawn from this number.
    pub(crate) seed: u64,
}

impl Link {
    /// How long after bytes have arrived the server's task runs. Half of the servers are not busy.
    fn late(&self) -> Duration {
        let late = if self.seed >> 63 == 0 {
            0
        } else {
            (self.seed >> 32) % 20
        };
        Duration::from_millis(late)
    }
}

enum Segment {
    Data(BytesMut),
    /// So many bytes have arrived.
    Acknowledged(usize),
    /// So many bytes have been read by the program.
    Window(usize),
    Fin,
    Reset,
}

/// One socket.
#[derive(Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "they change independently of one another"
)]
struct Socket {
    /// Written by the program, and not sent yet.
    unsent: BytesMut,
    /// Sent, and not acknowledged yet.
    unacknowledged: usize,
    /// How many bytes the peer still has room for, as far as this side knows.
    window: usize,
    /// Arrived, and not read by the program yet.
    unread: BytesMut,
    /// The program has closed its writing side.
    shut: bool,
    fin_sent: bool,
    /// The peer's FIN has arrived.
    ended: bool,
    /// This side has sent a reset, or one has arrived.
    reset: bool,
    /// The program has dropped the socket.
    closed: bool,
    /// The host is gone: nothing arrives and nothing is sent.
    vanished: bool,
    reader: Option<Waker>,
    /// When the reader is woken because bytes have arrived.
    wakes_at: Option<Instant>,
    writer: Option<Waker>,
    /// Segments on their way to the peer.
    flying: VecDeque<(Instant, Segment)>,
}

/// What the rules need to know about the server's socket.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    /// When the program closed its writing side.
    pub(crate) shut: Option<Instant>,
    /// When the program dropped the socket.
    pub(crate) closed: Option<Instant>,
    /// The bytes of the client that arrived before that.
    pub(crate) arrived: Pieces,
    /// What the program has written.
    pub(crate) written: Pieces,
    /// How many bytes of responses the server's own kernel has discarded when it reset the connection.
    /// `None` if it has not.
    pub(crate) discarded: Option<usize>,
}

/// Pieces of bytes, and when they arrived or were written.
#[derive(Clone, Default)]
pub(crate) struct Pieces(pub(crate) Vec<(Instant, Bytes)>);

impl fmt::Debug for Pieces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pieces = self.0.iter().map(|(at, piece)| (at, piece.len()));
        f.debug_map().entries(pieces).finish()
    }
}

struct State {
    link: Link,
    sockets: [Socket; 2],
    facts: Facts,
    random: u64,
    /// The polls so far. Limits programs that poll without end, for which no time passes.
    polls: u32,
}

/// Far more polls than any schedule needs.
const MOST_POLLS: u32 = 2_000_000;

impl State {
    /// A number of xorshift64*, which is enough for delays.
    fn random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32
    }

    fn send(&mut self, from: usize, segment: Segment) {
        if self.sockets[from].vanished {
            return;
        }
        let delay = Duration::from_millis(self.random() % (self.link.delay + 1));
        let flying = &mut self.sockets[from].flying;
        let before = flying.back().map(|(at, _)| *at);
        let at = (Instant::now() + delay).max(before.unwrap_or_else(Instant::now));
        flying.push_back((at, segment));
    }

    /// Sends what the window has room for.
    fn transmit(&mut self, from: usize) {
        loop {
            let most = self.link.segment;
            let socket = &mut self.sockets[from];
            let length = socket.unsent.len().min(socket.window).min(most);
            if length == 0 {
                break;
            }
            socket.window -= length;
            socket.unacknowledged += length;
            let data = socket.unsent.split_to(length);
            self.send(from, Segment::Data(data));
        }
        let socket = &mut self.sockets[from];
        if socket.unsent.is_empty() && socket.shut && !socket.fin_sent && !socket.reset {
            socket.fin_sent = true;
            self.send(from, Segment::Fin);
        }
    }

    fn reset(&mut self, from: usize) {
        if self.sockets[from].reset {
            return;
        }
        if from == SERVER {
            self.facts.discarded = Some(self.sockets[from].unsent.len());
        }
        self.sockets[from].reset = true;
        self.sockets[from].unsent.clear();
        self.send(from, Segment::Reset);
    }

    fn arrive(&mut self, to: usize, segment: Segment) {
        let late = self.link.late();
        let socket = &mut self.sockets[to];
        if socket.vanished || socket.reset {
            return;
        }
        match segment {
            Segment::Data(_) if socket.closed => self.reset(to),
            Segment::Data(data) => {
                let length = data.len();
                socket.unread.extend_from_slice(&data);
                if to == CLIENT || late.is_zero() {
                    wake(&mut socket.reader);
                } else {
                    socket.wakes_at.get_or_insert(Instant::now() + late);
                }
                if to == SERVER {
                    self.facts.arrived.0.push((Instant::now(), data.freeze()));
                }
                self.send(to, Segment::Acknowledged(length));
            }
            Segment::Acknowledged(length) => {
                socket.unacknowledged -= length;
                wake(&mut socket.writer);
            }
            Segment::Window(length) => {
                socket.window += length;
                self.transmit(to);
            }
            Segment::Fin => {
                socket.ended = true;
                wake(&mut socket.reader);
            }
            Segment::Reset => {
                socket.reset = true;
                socket.unsent.clear();
                wake(&mut socket.reader);
                wake(&mut socket.writer);
            }
        }
    }

    /// When the next segment arrives, and from which side, or when the server's reader is woken.
    fn next(&self) -> Option<(Instant, Option<usize>)> {
        let arrivals = [SERVER, CLIENT].map(|from| {
            let (at, _) = self.sockets[from].flying.front()?;
            Some((*at, Some(from)))
        });
        let wakes_at = self.sockets[SERVER].wakes_at.map(|at| (at, None));
        arrivals.into_iter().flatten().chain(wakes_at).min()
    }

    fn polled(&mut self) {
        self.polls += 1;
        assert!(self.polls < MOST_POLLS, "polled without end");
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

struct Shared {
    state: Mutex<State>,
    /// Something may have been sent.
    sent: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

/// Carries the segments of a connection. Ends when both programs have closed their sockets and
/// nothing is on its way.
async fn carry(shared: Arc<Shared>) {
    loop {
        let next = {
            let state = shared.lock();
            let next = state.next();
            if next.is_none() && state.sockets.iter().all(|socket| socket.closed) {
                return;
            }
            next
        };
        let Some((at, from)) = next else {
            shared.sent.notified().await;
            continue;
        };
        tokio::select! {
            biased;
            () = sleep_until(at) => {
                let mut state = shared.lock();
                if let Some(from) = from {
                    if let Some((_, segment)) = state.sockets[from].flying.pop_front() {
                        state.arrive(1 - from, segment);
                    }
                } else {
                    state.sockets[SERVER].wakes_at = None;
                    wake(&mut state.sockets[SERVER].reader);
                }
            }
            () = shared.sent.notified() => {}
        }
    }
}

/// A connection, as its observer sees it.
#[derive(Clone)]
pub(crate) struct Wire(Arc<Shared>);

impl Wire {
    pub(crate) fn facts(&self) -> Facts {
        self.0.lock().facts.clone()
    }

    /// The client's host is gone: no FIN, no reset and no acknowledgement from now on.
    pub(crate) fn client_vanishes(&self) {
        let mut state = self.0.lock();
        state.sockets[CLIENT].vanished = true;
        state.sockets[CLIENT].flying.clear();
    }
}

/// Opens a connection: the server's end, the client's end, and its observer.
pub(crate) fn connect(link: &Link) -> (End, End, Wire) {
    let socket = |peer: usize| Socket {
        window: link.receive[peer],
        ..Socket::default()
    };
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            sockets: [socket(CLIENT), socket(SERVER)],
            facts: Facts::default(),
            // xorshift never leaves zero.
            random: link.seed | 1,
            polls: 0,
            link: link.clone(),
        }),
        sent: Notify::new(),
    });
    tokio::spawn(carry(shared.clone()));
    let end = |side| End {
        shared: shared.clone(),
        side,
    };
    (end(SERVER), end(CLIENT), Wire(shared.clone()))
}

/// The program's side of a socket.
pub(crate) struct End {
    shared: Arc<Shared>,
    side: usize,
}

impl AsyncRead for End {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut state = self.shared.lock();
        state.polled();
        let socket = &mut state.sockets[self.side];
        if !socket.unread.is_empty() && !socket.vanished {
            let length = socket.unread.len().min(buf.remaining());
            buf.put_slice(&socket.unread.split_to(length));
            if !socket.reset {
                state.send(self.side, Segment::Window(length));
            }
            self.shared.sent.notify_one();
            return Poll::Ready(Ok(()));
        }
        if socket.reset {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if socket.ended {
            return Poll::Ready(Ok(()));
        }
        socket.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl AsyncWrite for End {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.shared.lock();
        state.polled();
        let most = state.link.send[self.side];
        let socket = &mut state.sockets[self.side];
        if socket.reset || socket.shut {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let room = most.saturating_sub(socket.unsent.len() + socket.unacknowledged);
        if room == 0 && !buf.is_empty() {
            socket.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let length = room.min(buf.len());
        socket.unsent.extend_from_slice(&buf[..length]);
        if self.side == SERVER {
            let written = Bytes::copy_from_slice(&buf[..length]);
            state.facts.written.0.push((Instant::now(), written));
        }
        state.transmit(self.side);
        self.shared.sent.notify_one();
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.shared.lock();
        state.polled();
        if state.sockets[self.side].reset {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        }
        state.sockets[self.side].shut = true;
        if self.side == SERVER {
            state.facts.shut.get_or_insert_with(Instant::now);
        }
        state.transmit(self.side);
        self.shared.sent.notify_one();
        Poll::Ready(Ok(()))
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if self.side == SERVER {
            state.facts.closed = Some(Instant::now());
        }
        let socket = &mut state.sockets[self.side];
        socket.closed = true;
        socket.wakes_at = None;
        socket.reader = None;
        socket.writer = None;
        if socket.unread.is_empty() {
            socket.shut = true;
            state.transmit(self.side);
        } else {
            state.reset(self.side);
        }
        self.shared.sent.notify_one();
    }
}
