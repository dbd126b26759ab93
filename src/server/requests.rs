//! The requests on a connection whose server is not ours, as reading and writing show them: for what is
//! to be warned of, see [`outside`](crate::connection::outside) and [`upgraded`](crate::connection::upgraded).
//!
//! A request is recognized where a read must begin with one: at the start of the connection, and after
//! that as long as each read was one whole request without a body. What is read otherwise ends the
//! looking.

use std::{collections::HashMap, sync::Mutex};

use http::{Method, StatusCode};

use super::ConnectionEntry;
use crate::{
    connection::{
        outside::Window,
        table::{LOOKED_AT, UPGRADES, WATCHED},
    },
    sync::lock,
};

/// How long the head of a first request may be.
const MOST_BYTES: usize = 8 * 1024;

/// How many requests of a connection are looked at.
const MOST_REQUESTS: u8 = 32;

/// What is known of the requests of connections that are [looked at](LOOKED_AT). Here and not with each
/// connection, because few are at a time and there may be very many.
#[derive(Default)]
pub(crate) struct Requests(Mutex<HashMap<usize, Box<Known>>>);

#[derive(Default)]
struct Known {
    /// What has been read of a head that is not whole.
    head: Vec<u8>,
    /// A request has been read and not answered.
    asked: bool,
    /// The next read begins with another request.
    another: bool,
    requests: u8,
    window: Option<Window>,
}

/// Something was read.
#[cold]
#[inline(never)]
pub(super) fn read(line: &ConnectionEntry, read: &[u8]) {
    look(line, |known| known.read(line, read));
}

/// Something is to be written.
#[cold]
#[inline(never)]
pub(super) fn wrote(line: &ConnectionEntry, written: &[u8]) {
    look(line, |known| known.wrote(line, written));
}

/// Looks, and says whether more can be known.
fn look(line: &ConnectionEntry, look: impl FnOnce(&mut Known) -> bool) {
    let requests = &line.owner.requests.0;
    // Not under the lock, because it may log.
    let mut known = lock!(requests).remove(&line.number()).unwrap_or_default();
    if look(&mut known) {
        lock!(requests).insert(line.number(), known);
    } else {
        known.end(line);
        line.flags.take(LOOKED_AT);
    }
}

/// The connection is dropped, or not to be looked at any more.
#[cold]
pub(super) fn end(line: &ConnectionEntry) {
    let known = lock!(line.owner.requests.0).remove(&line.number());
    if let Some(known) = known {
        known.end(line);
    }
}

impl Known {
    /// Whether more can be known.
    fn read(&mut self, line: &ConnectionEntry, read: &[u8]) -> bool {
        if self.asked {
            // A body, or the next request before its time.
            self.another = false;
            return true;
        }
        self.head.extend_from_slice(read);
        let Some(end) = self.head.windows(4).position(|end| end == b"\r\n\r\n") else {
            return self.head.len() < MOST_BYTES && is_http1(&self.head);
        };
        let whole = self.head.len() == end + 4;
        let head = std::mem::take(&mut self.head);
        let Some((method, path, fields)) = parse(&head[..end]) else {
            return false;
        };
        let (mut body, mut upgrades) = (false, false);
        for field in fields {
            let (name, value) = field.split_once(':').unwrap_or((field, ""));
            body |= name.eq_ignore_ascii_case("content-length") && value.trim() != "0"
                || name.eq_ignore_ascii_case("transfer-encoding");
            upgrades |= name.eq_ignore_ascii_case("upgrade");
        }
        if upgrades {
            line.flags.set(UPGRADES);
            line.owner.upgraded.asked(line.number(), path, line.peer());
        }
        if line.flags.has(WATCHED) {
            self.window = Window::open(&line.owner, &method, path, line.peer(), false);
        }
        self.asked = true;
        self.requests += 1;
        self.another = whole
            && !body
            && !upgrades
            && line.flags.has(WATCHED)
            && self.requests < MOST_REQUESTS
            && matches!(method, Method::GET | Method::HEAD);
        true
    }

    /// Whether more can be known.
    fn wrote(&mut self, line: &ConnectionEntry, written: &[u8]) -> bool {
        if !self.asked {
            // The rest of a response.
            return self.requests > 0;
        }
        let status = written.strip_prefix(b"HTTP/1.1 ".as_slice());
        let status = status.or_else(|| written.strip_prefix(b"HTTP/1.0 "));
        let status = status.and_then(|status| status.get(..3));
        let Some(status) = status.and_then(|status| StatusCode::from_bytes(status).ok()) else {
            return false;
        };
        if status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS {
            return true;
        }
        if let Some(window) = self.window.take() {
            window.answered(&line.owner, status);
        }
        self.asked = false;
        self.another
    }

    fn end(&self, line: &ConnectionEntry) {
        if let Some(window) = self.window {
            window.close(&line.owner);
        }
    }
}

/// Whether this may be the beginning of a request of HTTP/1.
fn is_http1(head: &[u8]) -> bool {
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or(head);
    let method = line.split(|byte| *byte == b' ').next().unwrap_or(line);
    method.len() <= "CONNECT".len() && method.iter().all(u8::is_ascii_uppercase)
}

/// The method, the path and the fields of a head.
fn parse(head: &[u8]) -> Option<(Method, &str, impl Iterator<Item = &str>)> {
    let mut lines = std::str::from_utf8(head).ok()?.split("\r\n");
    let mut request = lines.next()?.split(' ');
    let (method, target, version) = (request.next()?, request.next()?, request.next()?);
    if request.next().is_some() || !matches!(version, "HTTP/1.1" | "HTTP/1.0") {
        return None;
    }
    let path = target.split(['?', '#']).next()?;
    Some((Method::from_bytes(method.as_bytes()).ok()?, path, lines))
}
