//! The rules that every schedule must keep, checked against what clients and report say.

use std::time::Duration;

use proptest::prelude::*;
use tokio::time::Instant;
use tower_graceful::{Outcome, Report};

use crate::{
    arrivals,
    kernel::Facts,
    ms,
    schedule::{Client, End, Form, Schedule, Speaks},
    world::{Played, Seen},
};

/// Timers have milliseconds, and several follow one another.
const ROUNDING: Duration = ms(10);

/// What closing may take after the drain deadline.
const CLOSING: Duration = ms(500);

pub(crate) fn check(schedule: &Schedule, played: &Played) -> Result<(), TestCaseError> {
    let Some(report) = &played.report else {
        return Err(TestCaseError::fail("the service did not stop"));
    };
    let deadline = ms(schedule.drain_delay + schedule.drain_timeout);
    let took = played.stopped - played.triggered;
    prop_assert!(took <= deadline + CLOSING, "{took:?}\n{report}");
    prop_assert_eq!(played.connections_at_end, 0, "{}", report);
    prop_assert_eq!(played.in_flight_at_end, 0, "{}", report);
    the_report_counts_the_requests_that_were_cut(schedule, played, report)?;

    let cut_at = played.triggered + deadline - ROUNDING;
    let mut cut = 0;
    for (number, (client, seen)) in schedule.clients.iter().zip(&played.clients).enumerate() {
        prop_assert!(
            seen.received.is_some(),
            "client {number} waits for ever: {seen:?}"
        );
        bodies_are_as_sent(client, seen)?;
        if !lost(schedule, client, number, seen, played.triggered)
            || waited_as_documented(&seen.facts)
        {
            continue;
        }
        let at_cut = seen.facts.closed.is_some_and(|closed| closed >= cut_at);
        prop_assert!(
            at_cut,
            "client {number} lost a response: {seen:?}, triggered {:?}\n{report}",
            played.triggered
        );
        // A connection whose server had done with it counts as delivered when it is cut, because
        // without `SIOCOUTQ` nothing else is known.
        cut += usize::from(seen.facts.shut.is_none());
    }
    prop_assert!(
        report.remaining().connections >= cut && (cut == 0 || report.outcome() != Outcome::Clean),
        "{cut} connections lost a response at the cut: {:?}, triggered {:?}\n{report}",
        played.clients,
        played.triggered
    );
    Ok(())
}

fn the_report_counts_the_requests_that_were_cut(
    schedule: &Schedule,
    played: &Played,
    report: &Report,
) -> Result<(), TestCaseError> {
    // In flight at the cut for certain; perhaps, because the server may not have taken the only frame of the
    // response; and those that their clients miss.
    let (mut certain, mut possible, mut missing) = (0, 0, 0);
    for (client, seen) in schedule.clients.iter().zip(&played.clients) {
        let received = seen.received.as_deref().unwrap_or_default();
        for (index, request) in client.requests.iter().enumerate() {
            let is_whole = received.get(index).is_some_and(|received| received.whole);
            let is_missing = seen.handled[index] && !is_whole || seen.cut[index];
            let is_single = request.frames <= 1 && request.gap == 0;
            certain += usize::from(seen.cut[index]);
            possible += usize::from(seen.cut[index] || is_missing && is_single);
            missing += usize::from(is_missing);
        }
    }
    let remaining = report.remaining().requests;
    prop_assert!(
        (certain..=possible).contains(&remaining),
        "{certain} to {possible} requests were in flight at the cut\n{report}"
    );
    let cut = report.requests().cut;
    // What other servers than `serve` hold of a response counts as a response, at most one for each connection.
    let held = if schedule.form == Form::Serve {
        0
    } else {
        report.remaining().connections
    };
    prop_assert!(
        (remaining..=missing.max(held)).contains(&cut),
        "{cut} requests cut, {missing} missed\n{report}"
    );
    Ok(())
}

/// Whether the client does what is needed to receive its responses.
fn behaves(schedule: &Schedule, client: &Client) -> bool {
    match client.end {
        End::Stays | End::Closes => true,
        // Other servers than `serve` drop the handler at the FIN, and `serve` too unless it is set.
        End::HalfCloses => {
            matches!(client.speaks, Speaks::Http2 { .. })
                || schedule.form == Form::Serve && schedule.half_close
        }
        End::Leaves(_) | End::Vanishes(_) => false,
    }
}

/// Whether the client did not receive the whole response to a request whose handler was called or that the server
/// had to read, or a response whose head it has received.
fn lost(schedule: &Schedule, client: &Client, number: usize, seen: &Seen, stop: Instant) -> bool {
    let Some(received) = &seen.received else {
        return false;
    };
    let to_read = to_read(schedule, client, number, seen, stop);
    let mut requests = received.iter().zip(&seen.handled).zip(to_read);
    behaves(schedule, client)
        && requests.any(|((received, handled), to_read)| {
            (*handled || received.status.is_some() || to_read) && !received.whole
        })
}

/// Whether the server had to read each request: it was complete in the receive buffer before the server closed the
/// connection because of the stop.
fn to_read(
    schedule: &Schedule,
    client: &Client,
    number: usize,
    seen: &Seen,
    stop: Instant,
) -> Vec<bool> {
    let closed = seen.facts.shut.or(seen.facts.closed);
    let in_stop = closed.is_none_or(|closed| closed >= stop);
    let received = seen.received.iter().flatten();
    // A server of HTTP/1 closes after some responses, and does not read what is behind their requests. Other servers
    // than `serve` may drop any request that is pipelined.
    let mut is_last = !in_stop;
    let drops = schedule.form != Form::Serve
        && matches!(client.speaks, Speaks::Http1 { pipelines, .. } if pipelines);
    let requests = arrivals::complete(client, number, &seen.facts);
    let requests = requests.into_iter().zip(received).zip(&client.requests);
    let to_read = requests.map(|((complete, received), request)| {
        let to_read =
            !is_last && complete.is_some_and(|at| closed.is_none_or(|closed| at < closed));
        let is_unread = request.upload > 0 && !request.reads_upload;
        is_last |=
            drops || received.closes || is_unread && matches!(client.speaks, Speaks::Http1 { .. });
        to_read
    });
    to_read.collect()
}

/// The kernel has reset the connection, but only after the server had waited as long as the page of
/// `GracefulIo` says: without `SIOCOUTQ`, the server does not know what the client has received.
fn waited_as_documented(facts: &Facts) -> bool {
    let (Some(shut), Some(closed)) = (facts.shut, facts.closed) else {
        return false;
    };
    let arrived = facts.arrived.0.last().map_or(shut, |(at, _)| *at);
    let silence = if arrived > shut { ms(1000) } else { ms(250) };
    facts.discarded.is_some()
        && (closed - shut.max(arrived) >= silence || closed - shut >= ms(2000))
}

fn bodies_are_as_sent(client: &Client, seen: &Seen) -> Result<(), TestCaseError> {
    let received = seen.received.iter().flatten();
    for (request, received) in client.requests.iter().zip(received) {
        if received.status == Some(200) && received.whole {
            prop_assert_eq!(received.length, request.body_length(), "{:?}", request);
        }
    }
    Ok(())
}
