//! Clients that send requests while processes on one listening socket replace each other.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::client::Connection;

/// A connect that takes this long was repeated: the kernel repeats a dropped handshake after one second.
pub(crate) const RETRIED: Duration = Duration::from_millis(900);

/// Clients, each on its own thread, until they are stopped.
pub(crate) struct Load {
    over: Arc<AtomicBool>,
    clients: Vec<thread::JoinHandle<Seen>>,
}

/// The results of the clients.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) requests: usize,
    /// Requests on connections that had carried a request before.
    pub(crate) again: usize,
    /// Connections that the client left because a response said so, or that were closed while idle.
    pub(crate) moved: usize,
    pub(crate) failed: Vec<String>,
    /// Connects that failed.
    pub(crate) refused: Vec<String>,
    pub(crate) slowest_connect: Duration,
    /// The longest time of a request, with its connect if it has one, to the end of the response.
    pub(crate) slowest: Duration,
}

impl Seen {
    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.again += other.again;
        self.moved += other.moved;
        self.failed.extend(other.failed);
        self.refused.extend(other.refused);
        self.slowest_connect = self.slowest_connect.max(other.slowest_connect);
        self.slowest = self.slowest.max(other.slowest);
    }

    fn open(&mut self, address: SocketAddr) -> Option<Connection> {
        let begun = Instant::now();
        let opened = Connection::try_open(address);
        self.slowest_connect = self.slowest_connect.max(begun.elapsed());
        opened
            .map_err(|error| self.refused.push(error.to_string()))
            .ok()
    }

    fn request(&mut self, address: SocketAddr, open: &mut Option<Connection>) -> io::Result<()> {
        if open.as_ref().is_some_and(Connection::has_ended) {
            *open = None;
            self.moved += 1;
        }
        let begun = Instant::now();
        let mut connection = if let Some(connection) = open.take() {
            self.again += 1;
            connection
        } else if let Some(connection) = self.open(address) {
            connection
        } else {
            return Ok(());
        };
        let response = connection.try_request("GET", "/")?;
        self.slowest = self.slowest.max(begun.elapsed());
        self.requests += 1;
        if response.status != 200 {
            return Err(io::Error::other(format!("status {}", response.status)));
        }
        if response.says_close() {
            self.moved += 1;
        } else {
            *open = Some(connection);
        }
        Ok(())
    }
}

impl Load {
    /// Starts `anew` clients that open a connection for each request, and `keep` clients that keep their
    /// connections and are idle for up to `idle` between two requests.
    pub(crate) fn begin(address: SocketAddr, anew: usize, keep: usize, idle: Duration) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let clients = (0..anew + keep).map(|client| {
            let over = Arc::clone(&over);
            thread::spawn(move || {
                let mut seen = Seen::default();
                let mut open = None;
                let mut random = 0x9E37_79B9_u32.wrapping_mul(u32::try_from(client).unwrap() + 1);
                while !over.load(Ordering::Relaxed) {
                    if let Err(error) = seen.request(address, &mut open) {
                        seen.failed.push(error.to_string());
                        open = None;
                    }
                    if client < anew {
                        open = None;
                        thread::sleep(Duration::from_millis(2));
                    } else {
                        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        thread::sleep(idle * (random >> 16) / 0xFFFF);
                    }
                }
                seen
            })
        });
        let clients = clients.collect();
        Self { over, clients }
    }

    pub(crate) fn end(self) -> Seen {
        self.over.store(true, Ordering::Relaxed);
        let mut seen = Seen::default();
        for client in self.clients {
            seen.add(client.join().unwrap());
        }
        seen
    }
}
