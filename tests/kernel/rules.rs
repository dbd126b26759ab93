//! The rules that every schedule must keep, checked against what clients and report say.

use std::time::Duration;

use proptest::prelude::*;
use tower_graceful::Outcome;

use crate::{
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
    let requests = report.requests();
    prop_assert_eq!(
        requests.in_flight + requests.admitted,
        requests.finished + requests.cut + requests.dropped,
        "{:?}",
        requests
    );

    let cut_at = played.triggered + deadline - ROUNDING;
    let mut cut = 0;
    for (number, (client, seen)) in schedule.clients.iter().zip(&played.clients).enumerate() {
        prop_assert!(
            seen.received.is_some(),
            "client {number} waits for ever: {seen:?}"
        );
        bodies_are_as_sent(client, seen)?;
        if !lost(schedule, client, seen) || waited_as_documented(&seen.facts) {
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

/// Whether the client did not receive the whole response to a request whose handler was called, or a
/// response whose head it has received.
fn lost(schedule: &Schedule, client: &Client, seen: &Seen) -> bool {
    let Some(received) = &seen.received else {
        return false;
    };
    let mut requests = received.iter().zip(&seen.handled);
    behaves(schedule, client)
        && requests
            .any(|(received, handled)| (*handled || received.status.is_some()) && !received.whole)
}

/// The kernel has reset the connection, but only after the server had waited as long as the page of
/// `GracefulIo` says: without `SIOCOUTQ`, the server does not know what the client has received.
fn waited_as_documented(facts: &Facts) -> bool {
    let (Some(shut), Some(closed)) = (facts.shut, facts.closed) else {
        return false;
    };
    let arrived = facts.arrived.unwrap_or(shut);
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
