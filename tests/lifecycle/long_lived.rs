//! Long-lived work: tasks notified by `draining`, streams, and sockets.

use std::{
    collections::VecDeque,
    future::pending,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt, Sink, Stream, StreamExt, stream};
use tokio::{task::JoinSet, time::Instant};
use tokio_test::{assert_pending, assert_ready, assert_ready_eq, task};
use tower_graceful::{ConfigError, Graceful, GracefulBuilder, Phase, PhaseReached};

use crate::support::{let_others_run, ms, pass, plan, request, s};

/// No delay, and a drain of 10 s, of which the first 4 s are the spread.
fn spread() -> GracefulBuilder {
    plan().drain_delay(Duration::ZERO).drain_spread(s(4))
}

/// The times at which `count` futures are notified.
async fn notified(graceful: &Graceful, count: usize) -> JoinSet<Instant> {
    let mut all = JoinSet::new();
    for _ in 0..count {
        all.spawn(graceful.draining().map(|()| Instant::now()));
    }
    let_others_run().await;
    all
}

#[tokio::test(start_paused = true)]
async fn a_spread_notifies_tasks_one_after_another_evenly() {
    let graceful = spread().build().unwrap();
    let _held = request(&graceful);
    let all = notified(&graceful, 1_000).await;
    let begun = Instant::now();
    graceful.shutdown();
    let mut times = all.join_all().await;
    times.sort();
    for (n, time) in (1..).zip(&times) {
        let even = s(4) * n / 1_000;
        let off = even.abs_diff(*time - begun);
        assert!(off <= ms(50), "number {n} at {:?}", *time - begun);
    }
    assert_eq!(graceful.phase(), Phase::Draining);
}

#[tokio::test(start_paused = true)]
async fn a_task_that_polls_before_its_place_in_a_spread_waits_for_it() {
    let graceful = spread().build().unwrap();
    let _held = request(&graceful);
    let mut waiting = [(); 10].map(|()| task::spawn(graceful.draining()));
    for waiter in &mut waiting {
        assert_pending!(waiter.poll());
    }
    graceful.shutdown();
    let ready = waiting
        .iter_mut()
        .filter_map(|it| it.poll().is_ready().then_some(()));
    assert!(ready.count() <= 1);
}

#[tokio::test(start_paused = true)]
async fn without_a_spread_all_tasks_are_notified_at_once() {
    let graceful = plan().drain_delay(Duration::ZERO).build().unwrap();
    let _held = request(&graceful);
    let all = notified(&graceful, 1_000).await;
    let begun = Instant::now();
    graceful.shutdown();
    assert!(all.join_all().await.iter().all(|time| *time == begun));
}

#[tokio::test(start_paused = true)]
async fn tasks_not_notified_when_the_drain_ends_are_notified_then() {
    let graceful = spread().build().unwrap();
    let held = request(&graceful);
    let mut all = notified(&graceful, 100).await;
    graceful.shutdown();
    pass(s(1)).await;
    let mut early = 0;
    while all.try_join_next().is_some() {
        early += 1;
    }
    assert!((20..=30).contains(&early), "{early}");
    let ended = Instant::now();
    drop(held);
    assert!(all.join_all().await.iter().all(|time| *time == ended));
}

#[tokio::test(start_paused = true)]
async fn a_task_that_comes_while_others_are_notified_does_not_wait() {
    let graceful = spread().build().unwrap();
    let _held = request(&graceful);
    graceful.shutdown();
    pass(ms(1)).await;
    for _ in 0..100 {
        assert_ready!(task::spawn(graceful.draining()).poll());
    }
}

#[tokio::test(start_paused = true)]
async fn workers_and_servers_are_notified_at_once_in_any_case() {
    let graceful = spread().keep_listening(false).build().unwrap();
    let _held = request(&graceful);
    let (said, mut heard) = tokio::sync::mpsc::unbounded_channel();
    for _ in 0..20 {
        let said = said.clone();
        let worker = |stop: tower_graceful::Stop| async move {
            stop.await;
            said.send(Instant::now()).unwrap();
        };
        graceful.worker("worker", worker).unwrap();
    }
    let server = tokio::spawn(graceful.drain_on(pending()).map(|()| Instant::now()));
    let_others_run().await;
    let begun = Instant::now();
    graceful.shutdown();
    for _ in 0..20 {
        assert_eq!(heard.recv().await, Some(begun));
    }
    assert_eq!(server.await.unwrap(), begun);
}

#[tokio::test(start_paused = true)]
async fn a_task_that_stops_waiting_does_not_affect_the_others() {
    let graceful = spread().build().unwrap();
    let _held = request(&graceful);
    let mut all: Vec<_> = (0..100).map(|_| task::spawn(graceful.draining())).collect();
    for waiter in &mut all {
        assert_pending!(waiter.poll());
    }
    graceful.shutdown();
    pass(s(1)).await;
    let mut even = 0;
    all.retain(|_| {
        even += 1;
        even % 2 == 0
    });
    pass(s(3)).await;
    for waiter in &mut all {
        assert!(waiter.is_woken());
        assert_ready!(waiter.poll());
    }
}

#[tokio::test(start_paused = true)]
async fn a_spread_that_outlasts_the_drain_is_refused_with_its_numbers() {
    let error = plan().drain_spread(s(10)).build().unwrap_err();
    assert_eq!(
        error,
        ConfigError::DrainSpreadTooLong {
            drain_spread: s(10),
            drain: s(10)
        }
    );
    let text = error.to_string();
    assert!(
        text.contains("drain_spread 10s") && text.contains("the 10s that"),
        "{text}"
    );
    assert!(plan().drain_spread(ms(9_999)).build().is_ok());
    // The longer of the two delays leaves less time to drain.
    let interrupted = Graceful::builder()
        .grace_period(s(6))
        .cleanup_timeout(Duration::ZERO)
        .drain_delay(Duration::ZERO)
        .interrupt_delay(ms(4_500))
        .drain_spread(s(5));
    assert!(interrupted.build().is_err());
    assert!(
        Graceful::builder()
            .drain_spread(Duration::MAX)
            .build()
            .is_err()
    );
    let endless = Graceful::builder()
        .grace_period(Duration::MAX)
        .drain_spread(s(1_000_000_000));
    assert!(endless.build().is_ok());
}

#[test]
#[cfg(target_pointer_width = "64")]
fn a_wait_is_forty_bytes() {
    assert_eq!(size_of::<PhaseReached>(), 40);
}

#[tokio::test(start_paused = true)]
async fn a_stream_is_passed_on_until_draining_starts_and_then_has_its_last_item() {
    let graceful = plan().build().unwrap();
    let ticks = stream::iter([1, 2]).chain(stream::pending());
    let mut stream = task::spawn(graceful.until_draining(ticks).and_last(9));
    assert_ready_eq!(stream.poll_next(), Some(1));
    assert_ready_eq!(stream.poll_next(), Some(2));
    assert_pending!(stream.poll_next());
    let _held = request(&graceful);
    graceful.shutdown();
    pass(s(4)).await;
    assert!(!stream.is_woken(), "the delay is not the drain");
    pass(s(1)).await;
    assert!(stream.is_woken());
    assert_ready_eq!(stream.poll_next(), Some(9));
    for _ in 0..3 {
        assert_ready_eq!(stream.poll_next(), None);
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_always_ready_ends_too() {
    let graceful = plan().drain_delay(Duration::ZERO).build().unwrap();
    let mut stream = task::spawn(graceful.until_draining(stream::repeat(1)));
    assert_ready_eq!(stream.poll_next(), Some(1));
    graceful.shutdown();
    assert_ready_eq!(stream.poll_next(), None);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_ends_by_itself_has_no_last_item() {
    let graceful = plan().build().unwrap();
    let stream = graceful.until_draining(stream::iter([1])).and_last(9);
    assert_eq!(stream.collect::<Vec<_>>().await, [1]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_has_been_ended_is_dropped_with_its_last_item_still_to_come() {
    let alive = Arc::new(());
    let kept = Arc::clone(&alive);
    let graceful = plan().drain_delay(Duration::ZERO).build().unwrap();
    let inner = stream::pending().inspect(move |_| drop(Arc::clone(&kept)));
    let mut stream = task::spawn(graceful.until_draining(inner).and_last(9));
    assert_pending!(stream.poll_next());
    assert_eq!(Arc::strong_count(&alive), 2);
    graceful.shutdown();
    assert_ready_eq!(stream.poll_next(), Some(9));
    assert_eq!(Arc::strong_count(&alive), 1);
}

#[test]
fn a_streams_size_hint_never_promises_more_than_it_keeps() {
    let graceful = Graceful::new();
    let stream = graceful.until_draining(stream::iter([1, 2, 3]));
    assert_eq!(stream.size_hint(), (0, Some(3)));
    assert_eq!(stream.and_last(4).size_hint(), (0, Some(4)));
    let endless = graceful.until_draining(stream::repeat(1));
    assert_eq!(endless.size_hint(), (0, None));
}

/// A socket whose peer receives as many messages as it has room for, and sends a script.
#[derive(Clone, Default)]
struct Socket(Arc<Mutex<Peer>>);

#[derive(Default)]
struct Peer {
    /// Messages this side may send before it has to wait.
    room: usize,
    sent: Vec<&'static str>,
    /// How many more calls it takes until what was sent is flushed.
    flushes: usize,
    flushed: usize,
    says: VecDeque<Result<&'static str, &'static str>>,
    /// Answers a Close with its own Close, and closes the connection.
    polite: bool,
    closed: bool,
    refuses: bool,
    /// Messages that the peer sends without end.
    talks: Option<&'static str>,
    waker: Option<std::task::Waker>,
}

impl Stream for Socket {
    type Item = Result<&'static str, &'static str>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut peer = self.0.lock().unwrap();
        if let Some(talk) = peer.talks {
            return Poll::Ready(Some(Ok(talk)));
        }
        if let Some(said) = peer.says.pop_front() {
            // A peer that has sent something has room to receive again.
            peer.room += 1;
            cx.waker().wake_by_ref();
            return Poll::Ready(Some(said));
        }
        let answered = peer.polite && peer.flushed > 0;
        if peer.closed || answered {
            return Poll::Ready(None);
        }
        peer.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Sink<&'static str> for Socket {
    type Error = &'static str;

    fn poll_ready(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), &'static str>> {
        let peer = self.0.lock().unwrap();
        match (peer.refuses, peer.room) {
            (true, _) => Poll::Ready(Err("refused")),
            (false, 0) => Poll::Pending,
            (false, _) => Poll::Ready(Ok(())),
        }
    }

    fn start_send(self: Pin<&mut Self>, item: &'static str) -> Result<(), &'static str> {
        let mut peer = self.0.lock().unwrap();
        peer.room -= 1;
        peer.sent.push(item);
        Ok(())
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), &'static str>> {
        let mut peer = self.0.lock().unwrap();
        if peer.flushes > 0 {
            peer.flushes -= 1;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        peer.flushed = peer.sent.len();
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), &'static str>> {
        Poll::Ready(Ok(()))
    }
}

/// Closes a socket with this peer. Returns whether the peer has closed, and how long it took.
async fn close(peer: Peer) -> (bool, Duration, Vec<&'static str>) {
    let graceful = Graceful::new();
    let socket = Socket(Arc::new(Mutex::new(peer)));
    let hold = graceful.hold("socket");
    let begun = Instant::now();
    let closed = hold.close_socket(socket.clone(), "close", s(2)).await;
    assert_eq!(graceful.in_flight(), 0);
    assert_eq!(Arc::strong_count(&socket.0), 1, "the socket is dropped");
    let peer = socket.0.lock().unwrap();
    (closed, begun.elapsed(), peer.sent.clone())
}

#[tokio::test(start_paused = true)]
async fn a_socket_is_closed_when_its_peer_has_closed_too() {
    let peer = Peer {
        room: 1,
        polite: true,
        says: VecDeque::from([Ok("late"), Ok("later")]),
        ..Peer::default()
    };
    assert_eq!(close(peer).await, (true, Duration::ZERO, vec!["close"]));
}

#[tokio::test(start_paused = true)]
async fn a_close_message_is_flushed_however_long_that_takes() {
    let peer = Peer {
        room: 9,
        flushes: 3,
        polite: true,
        ..Peer::default()
    };
    assert_eq!(close(peer).await, (true, Duration::ZERO, vec!["close"]));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_answer_holds_the_drain_for_the_timeout_at_most() {
    let peer = Peer {
        room: 1,
        ..Peer::default()
    };
    assert_eq!(close(peer).await, (false, s(2), vec!["close"]));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_reads_nothing_holds_the_drain_for_the_timeout_at_most() {
    assert_eq!(close(Peer::default()).await, (false, s(2), vec![]));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_reads_only_after_its_data_was_read_is_read() {
    let peer = Peer {
        polite: true,
        says: VecDeque::from([Ok("first read me")]),
        ..Peer::default()
    };
    assert_eq!(close(peer).await, (true, Duration::ZERO, vec!["close"]));
}

#[tokio::test]
async fn a_peer_that_never_stops_sending_holds_the_drain_for_the_timeout_at_most() {
    let socket = Socket::default();
    socket.0.lock().unwrap().talks = Some("and another thing");
    let begun = std::time::Instant::now();
    let hold = Graceful::new().hold("socket");
    assert!(!hold.close_socket(socket, "close", ms(100)).await);
    assert!(begun.elapsed() < s(5), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_is_gone_is_not_waited_for() {
    let peer = Peer {
        room: 1,
        says: VecDeque::from([Err("reset")]),
        ..Peer::default()
    };
    let (closed, after, _) = close(peer).await;
    assert_eq!((closed, after), (false, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_closed_first_needs_no_close() {
    let peer = Peer {
        refuses: true,
        closed: true,
        ..Peer::default()
    };
    assert_eq!(close(peer).await, (true, Duration::ZERO, vec![]));
}

#[tokio::test(start_paused = true)]
async fn dropping_close_socket_ends_the_hold() {
    let graceful = Graceful::new();
    let socket = Socket::default();
    let mut close = task::spawn(graceful.hold("socket").close_socket(
        socket.clone(),
        "close",
        Duration::MAX,
    ));
    assert_pending!(close.poll());
    assert_eq!(graceful.in_flight(), 1);
    drop(close);
    assert_eq!(graceful.in_flight(), 0);
    assert_eq!(Arc::strong_count(&socket.0), 1);
}

#[test]
fn an_unpolled_close_socket_drops_the_socket_before_the_hold() {
    struct Dropped(Graceful, Arc<Mutex<Option<usize>>>, Socket);

    impl Drop for Dropped {
        fn drop(&mut self) {
            *self.1.lock().unwrap() = Some(self.0.in_flight());
        }
    }

    impl Stream for Dropped {
        type Item = <Socket as Stream>::Item;

        fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
            Pin::new(&mut self.2).poll_next(cx)
        }
    }

    impl Sink<&'static str> for Dropped {
        type Error = &'static str;

        fn poll_ready(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), &'static str>> {
            Poll::Pending
        }

        fn start_send(self: Pin<&mut Self>, _: &'static str) -> Result<(), &'static str> {
            Ok(())
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), &'static str>> {
            Poll::Pending
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), &'static str>> {
            Poll::Pending
        }
    }

    let graceful = Graceful::new();
    let in_flight = Arc::new(Mutex::new(None));
    let socket = Dropped(graceful.clone(), Arc::clone(&in_flight), Socket::default());
    drop(graceful.hold("socket").close_socket(socket, "close", s(1)));
    assert_eq!(*in_flight.lock().unwrap(), Some(1));
    assert_eq!(graceful.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_close_socket() {
    let graceful = plan().drain_delay(Duration::ZERO).build().unwrap();
    let hold = graceful.hold("socket");
    let close = graceful.draining().then(|()| async {
        let peer = Peer {
            room: 1,
            ..Peer::default()
        };
        hold.close_socket(Socket(Arc::new(Mutex::new(peer))), "close", s(3))
            .await
    });
    let close = tokio::spawn(close);
    let begun = Instant::now();
    graceful.shutdown();
    graceful.stopped().await;
    assert_eq!(begun.elapsed(), s(3));
    assert!(!close.await.unwrap());
}
