//! What Redis publishes, as it comes.
//!
//! A message is a hint: it may be lost, and in a Cluster it comes once from each master. Whoever gets one,
//! and whoever begins to listen (again), reads the state itself.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::stream::{self, SelectAll, Stream, StreamExt as _};

use super::LinkError;
use super::link::Timeouts;
use crate::config::redis_url::{Address, Servers, Target};

/// Something that was published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Where.
    pub channel: String,
    /// What.
    pub payload: Vec<u8>,
}

/// What is published on some channels. It ends when a connection does; then some may have been missed.
pub struct Messages {
    servers: SelectAll<Pin<Box<dyn Stream<Item = Option<Message>> + Send>>>,
    over: bool,
}

impl fmt::Debug for Messages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Messages").field("servers", &self.servers.len()).finish_non_exhaustive()
    }
}

impl Stream for Messages {
    type Item = Message;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Message>> {
        if self.over {
            return Poll::Ready(None);
        }
        self.servers.poll_next_unpin(context).map(|found| {
            let message = found.flatten();
            self.over = message.is_none();
            message
        })
    }
}

impl Target {
    /// Listens to channels, on connections of its own: to the server, to the master of now, or to each
    /// master of the Cluster, since keyspace notifications (channels like `__keyspace@0__:NAME`) stay on
    /// the server that holds the key.
    ///
    /// # Errors
    /// When one server cannot be reached or does not let us listen.
    pub async fn listen(&self, timeouts: Timeouts, channels: &[&str]) -> Result<Messages, LinkError> {
        let addresses = match &self.servers {
            Servers::One(address) => vec![address.clone()],
            Servers::Sentinels { .. } => vec![self.master(timeouts).await?.1],
            Servers::Cluster { .. } => self.cluster_masters(timeouts).await?,
        };
        let mut servers = SelectAll::new();
        for address in addresses {
            servers.push(self.listen_to(&address, timeouts, channels).await?);
        }
        Ok(Messages { servers, over: false })
    }

    /// What one server publishes, and `None` when it has gone.
    async fn listen_to(
        &self,
        address: &Address,
        timeouts: Timeouts,
        channels: &[&str],
    ) -> Result<Pin<Box<dyn Stream<Item = Option<Message>> + Send>>, LinkError> {
        let client = self.client(address, &self.credentials, self.database)?;
        let subscribed = async {
            let mut listener = client.get_async_pubsub().await?;
            listener.subscribe(channels).await?;
            Ok(listener)
        };
        // The client has no timeouts of its own here.
        let listener = tokio::time::timeout(timeouts.connect + timeouts.response, subscribed)
            .await
            .map_err(|_| LinkError::timed_out(&address.to_string()))?
            .map_err(|error| LinkError::of(error, &address.to_string()))?;
        let messages = listener.into_on_message().map(|message| {
            Some(Message {
                channel: message.get_channel_name().to_owned(),
                payload: message.get_payload_bytes().to_vec(),
            })
        });
        Ok(messages.chain(stream::once(async { None })).boxed())
    }
}
