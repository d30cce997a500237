//! A live connection to Redis that never reconnects by itself.
//!
//! The client's own reconnecting manager and its Sentinel client stay with a server that has become a
//! replica, for as long as its TCP connection lives. Here a failover is an error, and whoever asks again
//! gets a link to the master of then, proved by `ROLE`. Only a Cluster's connection follows what moves by
//! itself: its slots have no one address to come back to.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::cluster_routing::{Route, RoutingInfo, SingleNodeRoutingInfo, Slot, SlotAddr};
use redis::io::tcp::{TcpSettings, socket2::TcpKeepalive};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, FromRedisValue,
    IntoConnectionInfo as _, RedisConnectionInfo, ScriptInvocation, TlsCertificates, Value,
};

use super::LinkError;
use crate::config::redis_url::{Address, Credentials, Servers, Target};

/// How many slots a Cluster has (its specification, "Key distribution model").
const SLOTS: usize = 16384;

/// How many slots' commands of one pipeline are under way in a Cluster: enough to fill the line, and no more than
/// its connection queues.
const CLUSTER_CONCURRENCY: usize = 64;

/// How often a Cluster's connection tries a command again that met a moved slot or a lost node, all within
/// the response timeout.
const CLUSTER_RETRIES: u32 = 3;

/// How many keys `SCAN` looks at in one step: about 1 ms of a server's time.
const SCAN_COUNT: usize = 1000;

/// How long Redis may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// To accept a connection and let us in.
    pub connect: Duration,
    /// To answer a command or a whole pipeline.
    pub response: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect: Duration::from_secs(1), response: Duration::from_millis(500) }
    }
}

/// A live connection, cheap to clone; all clones share it. It closes with the last clone.
#[derive(Clone)]
pub struct Link {
    connection: Connection,
    /// Who is at the other end; for a Cluster, its seeds.
    address: Arc<str>,
    target: Arc<Target>,
    timeouts: Timeouts,
}

#[derive(Clone)]
enum Connection {
    One(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Link({} of {})", self.address, self.target)
    }
}

impl Target {
    /// Connects: to the one server whatever its role, to the master that the Sentinels name and that says
    /// itself that it is one, or to a Cluster that serves all slots.
    ///
    /// # Errors
    /// When there is none; it can be tried again at any time.
    pub async fn connect(&self, timeouts: Timeouts) -> Result<Link, LinkError> {
        match &self.servers {
            Servers::One(address) => self.link(address, timeouts).await,
            Servers::Sentinels { .. } => Ok(self.master(timeouts).await?.0),
            Servers::Cluster { .. } => self.cluster(timeouts).await,
        }
    }

    /// A link to one server.
    async fn link(&self, address: &Address, timeouts: Timeouts) -> Result<Link, LinkError> {
        let client = self.client(address, &self.credentials, self.database)?;
        let connection = connect(&client, address, timeouts).await?;
        Ok(Link {
            connection: Connection::One(connection),
            address: address.to_string().into(),
            target: Arc::new(self.clone()),
            timeouts,
        })
    }

    /// The first master named by a Sentinel that proves to be one.
    pub(super) async fn master(&self, timeouts: Timeouts) -> Result<(Link, Address), LinkError> {
        let Servers::Sentinels { addresses, master, credentials } = &self.servers else {
            unreachable!("only called for Sentinels");
        };
        let mut problem = None;
        for sentinel in addresses {
            let found = match self.ask_sentinel(sentinel, master, credentials, timeouts).await {
                Ok(Some(address)) => self.proved_master(&address, timeouts).await.map(|link| (link, address)),
                Ok(None) => {
                    Err(LinkError::UnknownMaster { addresses: join(addresses), name: master.clone() })
                }
                // A master that is not well says more than a Sentinel that is not there.
                Err(error) if problem.is_some() => {
                    tracing::debug!(%sentinel, %error, "a Sentinel does not answer");
                    continue;
                }
                Err(error) => Err(error),
            };
            match found {
                Ok(found) => return Ok(found),
                Err(error) => problem = Some(error),
            }
        }
        Err(problem.unwrap_or_else(|| LinkError::timed_out(&join(addresses))))
    }

    /// The address of the master, as `host:port`, as the first Sentinel says that answers and whose master proves to
    /// be one; `None` when there is none, or there are no Sentinels.
    pub async fn master_by_sentinels(&self, timeouts: Timeouts) -> Option<String> {
        match &self.servers {
            Servers::Sentinels { .. } => Some(self.master(timeouts).await.ok()?.1.to_string()),
            _ => None,
        }
    }

    async fn ask_sentinel(
        &self,
        sentinel: &Address,
        master: &str,
        credentials: &Credentials,
        timeouts: Timeouts,
    ) -> Result<Option<Address>, LinkError> {
        let client = self.client(sentinel, credentials, 0)?;
        let mut connection = connect(&client, sentinel, timeouts).await?;
        let answer: Option<(String, u16)> = redis::cmd("SENTINEL")
            .arg("GET-MASTER-ADDR-BY-NAME")
            .arg(master)
            .query_async(&mut connection)
            .await
            .map_err(|error| LinkError::of(error, &sentinel.to_string()))?;
        Ok(answer.map(|(host, port)| Address { host, port }))
    }

    async fn proved_master(&self, address: &Address, timeouts: Timeouts) -> Result<Link, LinkError> {
        let link = self.link(address, timeouts).await?;
        // It names its role first; what follows differs from role to role.
        let role: Vec<Value> = link.query(&redis::cmd("ROLE")).await?;
        match role.first() {
            Some(Value::BulkString(role)) if role == b"master" => Ok(link),
            _ => Err(LinkError::NotMaster { address: address.to_string() }),
        }
    }

    async fn cluster(&self, timeouts: Timeouts) -> Result<Link, LinkError> {
        // Asked first on plain connections, whose errors say what is wrong; the Cluster's connection calls
        // everything an I/O error.
        let masters = self.cluster_masters(timeouts).await?;
        let address: Arc<str> = join(&masters).into();
        let nodes = masters.iter().map(|address| self.information(address, &self.credentials, 0));
        let mut builder = ClusterClient::builder(nodes.collect::<Result<Vec<_>, _>>()?)
            .connection_timeout(timeouts.connect)
            .response_timeout(timeouts.response)
            .retries(CLUSTER_RETRIES)
            .tcp_settings(tcp_settings());
        if self.tls.is_some() {
            builder = builder.certs(self.certificates()?);
        }
        let client = builder.build().map_err(|error| LinkError::of(error, &address))?;
        let connecting = client.get_async_connection();
        // It connects to all nodes at once, asks one for the slots, and connects to what it did not know.
        let connection = tokio::time::timeout(timeouts.connect * 2 + timeouts.response, connecting)
            .await
            .map_err(|_| LinkError::timed_out(&address))?
            .map_err(|error| LinkError::of(error, &address))?;
        Ok(Link {
            connection: Connection::Cluster(connection),
            address,
            target: Arc::new(self.clone()),
            timeouts,
        })
    }

    /// The masters of a Cluster, in order, as the first seed says that answers.
    pub(super) async fn cluster_masters(&self, timeouts: Timeouts) -> Result<Vec<Address>, LinkError> {
        let Servers::Cluster { seeds } = &self.servers else {
            unreachable!("only called for a Cluster");
        };
        let mut problem = None;
        for seed in seeds {
            match self.slots(seed, timeouts).await {
                Ok(masters) => return Ok(masters),
                Err(error) => problem = Some(error),
            }
        }
        Err(problem.unwrap_or_else(|| LinkError::timed_out(&join(seeds))))
    }

    /// The masters as one node knows them, if they serve all slots: fewer hold only a part of the keys.
    async fn slots(&self, seed: &Address, timeouts: Timeouts) -> Result<Vec<Address>, LinkError> {
        let client = self.client(seed, &self.credentials, 0)?;
        let mut connection = connect(&client, seed, timeouts).await?;
        let answer = redis::cmd("CLUSTER").arg("SLOTS").query_async(&mut connection).await;
        let ranges: Vec<(usize, usize, Value)> =
            answer.map_err(|error| match LinkError::of(error, &seed.to_string()) {
                LinkError::Other { .. } => LinkError::NoCluster { address: seed.to_string() },
                error => error,
            })?;
        let served: usize = ranges.iter().map(|(first, last, _)| last.saturating_sub(*first) + 1).sum();
        if served < SLOTS {
            return Err(LinkError::ClusterDown { code: "SLOTS".to_owned() });
        }
        let mut masters: Vec<Address> =
            ranges.into_iter().filter_map(|(_, _, node)| node_address(node, seed)).collect();
        masters.sort();
        masters.dedup();
        Ok(masters)
    }

    /// A client for one server, which connects to nothing yet.
    pub(super) fn client(
        &self,
        address: &Address,
        credentials: &Credentials,
        database: u32,
    ) -> Result<Client, LinkError> {
        let information = self.information(address, credentials, database)?;
        let client = match self.tls {
            Some(_) => Client::build_with_tls(information, self.certificates()?),
            None => Client::open(information),
        };
        client.map_err(|error| LinkError::of(error, &address.to_string()))
    }

    fn information(
        &self,
        address: &Address,
        credentials: &Credentials,
        database: u32,
    ) -> Result<ConnectionInfo, LinkError> {
        let Address { host, port } = address.clone();
        let place = match self.tls {
            Some(_) => ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None },
            None => ConnectionAddr::Tcp(host, port),
        };
        let mut login = RedisConnectionInfo::default()
            .set_db(database.into())
            .set_lib_name("keygate", env!("CARGO_PKG_VERSION"));
        if let Some(user) = &credentials.user {
            login = login.set_username(user);
        }
        if let Some(password) = &credentials.password {
            login = login.set_password(password.expose().as_str());
        }
        let information =
            place.into_connection_info().map_err(|error| LinkError::of(error, &address.to_string()))?;
        Ok(information.set_redis_settings(login).set_tcp_settings(tcp_settings()))
    }

    fn certificates(&self) -> Result<TlsCertificates, LinkError> {
        // The client asks rustls for the provider of the process. There is one while ring is the only one
        // compiled in; named, it stays so when some dependency brings another. Whoever was first may stay.
        let _ = rustls::crypto::ring::default_provider().install_default();
        // Read each time, so that renewed roots need no restart.
        let root_cert = match self.ca() {
            Some(path) => {
                let error =
                    |source: std::io::Error| LinkError::Ca { path: path.into(), source: source.into() };
                let text = std::fs::read(path).map_err(error)?;
                // Without any the client would trust nobody and blame the server.
                if !text.windows(27).any(|window| window == b"-----BEGIN CERTIFICATE-----") {
                    return Err(error(std::io::ErrorKind::InvalidData.into()));
                }
                Some(text)
            }
            None => None,
        };
        Ok(TlsCertificates { client_tls: None, root_cert })
    }
}

impl Link {
    /// Sends one command.
    ///
    /// # Errors
    /// See [`LinkError`]. After [`LinkError::Unreachable`] the command may have been carried out.
    pub async fn query<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, LinkError> {
        match self.connection.clone() {
            Connection::One(mut connection) => command.query_async(&mut connection).await,
            Connection::Cluster(mut connection) => command.query_async(&mut connection).await,
        }
        .map_err(|error| self.error(error))
    }

    /// Sends a command to the server that holds `key`, for what a server does for itself.
    ///
    /// # Errors
    /// As for [`Self::query`].
    pub async fn query_at<T: FromRedisValue>(&self, key: &str, command: &Cmd) -> Result<T, LinkError> {
        let Connection::Cluster(mut connection) = self.connection.clone() else {
            return self.query(command).await;
        };
        let route = Route::with_key(key.as_bytes(), SlotAddr::Master);
        let routing = RoutingInfo::SingleNode(SingleNodeRoutingInfo::SpecificNode(route));
        let value =
            connection.route_command(command.clone(), routing).await.map_err(|error| self.error(error))?;
        redis::from_redis_value(value).map_err(|error| self.error(error.into()))
    }

    /// Sends commands without waiting for each other's answers, and gives what became of each. One server
    /// carries them out in order, on one connection, and others' commands may come between. In a Cluster only
    /// those of one slot are in order; there each command's first argument must be its key.
    ///
    /// One server has the response timeout for all of them: a few thousand at most.
    ///
    /// # Errors
    /// When nothing is known of any of them.
    pub async fn pipeline(&self, commands: &[Cmd]) -> Result<Vec<Result<Value, LinkError>>, LinkError> {
        if commands.is_empty() {
            return Ok(Vec::new());
        }
        match self.connection.clone() {
            Connection::One(connection) => self.pipeline_on(connection, commands.iter()).await,
            Connection::Cluster(connection) => Ok(self.pipelines(&connection, commands).await),
        }
    }

    async fn pipeline_on(
        &self,
        mut connection: impl ConnectionLike,
        commands: impl ExactSizeIterator<Item = &Cmd>,
    ) -> Result<Vec<Result<Value, LinkError>>, LinkError> {
        let count = commands.len();
        let mut pipeline = redis::pipe();
        for command in commands {
            pipeline.add_command(command.clone());
        }
        let answers =
            connection.req_packed_commands(&pipeline, 0, count).await.map_err(|error| self.error(error))?;
        let read = |value| match value {
            Value::ServerError(error) => Err(self.error(error.into())),
            value => Ok(value),
        };
        Ok(answers.into_iter().map(read).collect())
    }

    /// A pipeline for each slot: the Cluster's connection takes no other, and single commands overtake each
    /// other in it.
    async fn pipelines(
        &self,
        connection: &ClusterConnection,
        commands: &[Cmd],
    ) -> Vec<Result<Value, LinkError>> {
        let mut of_slots: HashMap<Option<Slot>, Vec<usize>> = HashMap::new();
        for (index, command) in commands.iter().enumerate() {
            let slot = match command.args_iter().nth(1) {
                Some(redis::Arg::Simple(key)) => Some(Slot::for_key(key)),
                _ => None,
            };
            of_slots.entry(slot).or_default().push(index);
        }
        let answers = stream::iter(of_slots.into_values()).map(async |indices| {
            let chosen = indices.iter().filter_map(|index| commands.get(*index)).collect::<Vec<_>>();
            let answers = self.pipeline_on(connection.clone(), chosen.into_iter()).await;
            let each = |(position, index)| {
                let answer = match &answers {
                    Ok(answers) => answers.get(position).cloned(),
                    Err(error) => Some(Err(error.clone())),
                };
                let missing = || LinkError::Other { code: "count of answers".to_owned() };
                (index, answer.unwrap_or_else(|| Err(missing())))
            };
            indices.into_iter().enumerate().map(each).collect::<Vec<_>>()
        });
        let mut answers = answers.buffer_unordered(CLUSTER_CONCURRENCY).concat().await;
        answers.sort_unstable_by_key(|(index, _)| *index);
        answers.into_iter().map(|(_, answer)| answer).collect()
    }

    /// Runs a script, which is loaded where it is missing. In a Cluster all its keys must be in one slot.
    ///
    /// # Errors
    /// As for [`Self::query`].
    pub async fn script<T: FromRedisValue>(&self, script: &ScriptInvocation<'_>) -> Result<T, LinkError> {
        match self.connection.clone() {
            Connection::One(mut connection) => script.invoke_async(&mut connection).await,
            Connection::Cluster(mut connection) => script.invoke_async(&mut connection).await,
        }
        .map_err(|error| self.error(error))
    }

    /// Whether it leads to a Cluster.
    pub fn is_cluster(&self) -> bool {
        matches!(self.connection, Connection::Cluster(_))
    }

    /// Who is at the other end, as `host:port`; of a Cluster, the masters there were at first.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A link to each server that holds keys of its own, for what a server says only of itself: this one,
    /// or new ones to each master of the Cluster.
    ///
    /// # Errors
    /// When one of them cannot be reached: some are not all.
    pub async fn masters(&self) -> Result<Vec<Self>, LinkError> {
        if !self.is_cluster() {
            return Ok(vec![self.clone()]);
        }
        let mut links = Vec::new();
        for address in self.target.cluster_masters(self.timeouts).await? {
            links.push(self.target.link(&address, self.timeouts).await?);
        }
        Ok(links)
    }

    /// Gives the names of all keys that match a glob pattern to `each`, batch by batch: all that are there
    /// from beginning to end, some twice. Names that are not UTF-8 are not ours and left out.
    ///
    /// # Errors
    /// When not all could be looked at.
    pub async fn scan(
        &self,
        pattern: &str,
        each: &mut (dyn FnMut(Vec<String>) + Send),
    ) -> Result<(), LinkError> {
        for master in self.masters().await? {
            let mut cursor = 0_u64;
            loop {
                let mut command = redis::cmd("SCAN");
                command.arg(cursor).arg("MATCH").arg(pattern).arg("COUNT").arg(SCAN_COUNT);
                let (next, keys): (u64, Vec<Vec<u8>>) = master.query(&command).await?;
                let keys: Vec<String> =
                    keys.into_iter().filter_map(|key| String::from_utf8(key).ok()).collect();
                if !keys.is_empty() {
                    each(keys);
                }
                if next == 0 {
                    break;
                }
                cursor = next;
            }
        }
        Ok(())
    }

    fn error(&self, error: redis::RedisError) -> LinkError {
        match LinkError::of(error, &self.address) {
            // The Cluster's connection has followed as often as it may.
            LinkError::IsCluster { .. } if self.is_cluster() => {
                LinkError::ClusterDown { code: "MOVED".to_owned() }
            }
            error => error,
        }
    }
}

async fn connect(
    client: &Client,
    address: &Address,
    timeouts: Timeouts,
) -> Result<MultiplexedConnection, LinkError> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(timeouts.connect))
        .set_response_timeout(Some(timeouts.response));
    client
        .get_multiplexed_async_connection_with_config(&config)
        .await
        .map_err(|error| LinkError::of(error, &address.to_string()))
}

/// For a connection that only listens: a server that is gone without a word is noticed after
/// 5 s + 3 × 2 s. Commands have their timeout.
fn tcp_settings() -> TcpSettings {
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(5))
        .with_interval(Duration::from_secs(2))
        .with_retries(3);
    TcpSettings::default().set_nodelay(true).set_keepalive(keepalive)
}

/// The address in a node of `CLUSTER SLOTS`. A node that does not know its own host gives none or `?`: then
/// it is the one we asked.
fn node_address(node: Value, asked: &Address) -> Option<Address> {
    let Value::Array(node) = node else { return None };
    let mut members = node.into_iter();
    let host: Option<String> = redis::from_redis_value(members.next()?).ok()?;
    let port = redis::from_redis_value(members.next()?).ok()?;
    let host = host.filter(|host| !host.is_empty() && host != "?").unwrap_or_else(|| asked.host.clone());
    Some(Address { host, port })
}

fn join(addresses: &[Address]) -> String {
    addresses.iter().map(Address::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compiles only while all of it can run on a task that moves between threads.
    #[test]
    fn a_link_is_of_use_on_any_task() {
        fn on_a_task<T: Send>(_: impl FnOnce(Link, Target) -> T) {}
        on_a_task(|link, target| async move {
            let script = redis::Script::new("");
            let made = target.connect(Timeouts::default()).await;
            let heard = target.listen(Timeouts::default(), &["a"]).await;
            let ran = link.script::<Value>(&script.prepare_invoke()).await;
            let found = link.scan("", &mut |_| ()).await;
            let (masters, answers) = (link.masters().await, link.pipeline(&[]).await);
            (made, heard, ran, found, masters, answers)
        });
    }
}
