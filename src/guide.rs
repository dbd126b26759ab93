//! The guide: one page for each question.
//!
//! This module has only pages, and is compiled for the documentation only. Each page is a file under
//! `docs/`. Its programs are doc tests. rustdoc shows some as not tested: other tests of this repository
//! compile them and compare the text. Only the excerpt with tokio-graceful is not compiled.

// The links before a page replace those at its end, which lead to files.

#[doc = include_str!("../docs/timeline.svg")]
#[doc = ""]
#[doc = include_str!("../docs/sigterm.md")]
pub mod sigterm {}

#[doc = "[Without a load balancer]: one_machine"]
#[doc = ""]
#[doc = include_str!("../docs/numbers.md")]
pub mod numbers {}

#[doc = include_str!("../docs/layer_order.md")]
pub mod layer_order {}

#[doc = include_str!("../docs/workers.md")]
pub mod workers {}

#[doc = include_str!("../docs/streams.md")]
pub mod streams {}

#[doc = include_str!("../docs/tls.md")]
pub mod tls {}

#[doc = include_str!("../docs/one_machine.md")]
pub mod one_machine {}

#[doc = include_str!("../docs/observability.md")]
pub mod observability {}

#[doc = include_str!("../docs/testing.md")]
pub mod testing {}

#[doc = "[WebSocket, SSE, streams, gRPC]: streams"]
#[doc = ""]
#[doc = include_str!("../docs/exit_codes.md")]
pub mod exit_codes {}

#[doc = "[WebSocket, SSE, streams, gRPC]: streams"]
#[doc = ""]
#[doc = include_str!("../docs/other_servers.md")]
pub mod other_servers {}

#[doc = "[WebSocket, SSE, streams, gRPC]: streams"]
#[doc = "[Without a load balancer]: one_machine"]
#[doc = ""]
#[doc = include_str!("../docs/limits.md")]
pub mod limits {}

#[doc = include_str!("../docs/comparison.md")]
pub mod comparison {}

#[doc = "[Layer order]: layer_order"]
#[doc = "[TLS and other handshakes]: tls"]
#[doc = ""]
#[doc = include_str!("../docs/migration.md")]
pub mod migration {}
