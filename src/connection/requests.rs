//! What is known about the requests of inspected connections. `server::requests` inspects them.

use std::{collections::HashMap, sync::Mutex};

use http::Method;

use super::outside::Window;
use crate::sync::lock;

/// What is known about the requests of each [inspected](super::flags::INSPECTED) connection. It is
/// apart from the connection entries, because few connections have a request that is being inspected at a time.
#[derive(Default)]
pub(crate) struct Requests(Mutex<HashMap<usize, Box<Known>>>);

impl Requests {
    /// Removes what is known about a connection, and returns it.
    pub(crate) fn take(&self, connection: usize) -> Option<Box<Known>> {
        lock!(self.0).remove(&connection)
    }

    pub(crate) fn put(&self, connection: usize, known: Box<Known>) {
        lock!(self.0).insert(connection, known);
    }
}

#[derive(Default)]
pub(crate) struct Known {
    /// The part that has been read of an incomplete head.
    pub(crate) head: Vec<u8>,
    /// A request has been read, and its response has not been written.
    pub(crate) asked: bool,
    /// After the response, the next read begins with another request.
    pub(crate) another: bool,
    pub(crate) requests: u8,
    pub(crate) window: Option<Window>,
}

/// Whether these bytes may be the beginning of an HTTP/1 request.
pub(crate) fn is_http1(head: &[u8]) -> bool {
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or(head);
    let method = line.split(|byte| *byte == b' ').next().unwrap_or(line);
    method.len() <= "CONNECT".len() && method.iter().all(u8::is_ascii_uppercase)
}

/// The method, the path and the header fields of a head.
pub(crate) fn parse(head: &[u8]) -> Option<(Method, &str, impl Iterator<Item = &str>)> {
    let mut lines = std::str::from_utf8(head).ok()?.split("\r\n");
    let mut request = lines.next()?.split(' ');
    let (method, target, version) = (request.next()?, request.next()?, request.next()?);
    if request.next().is_some() || !matches!(version, "HTTP/1.1" | "HTTP/1.0") {
        return None;
    }
    let path = target.split(['?', '#']).next()?;
    Some((Method::from_bytes(method.as_bytes()).ok()?, path, lines))
}
