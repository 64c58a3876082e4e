// Run by mongo's health check, again and again: makes the one-node replica set and the product's user where they are
// missing, and ends with 0 once the node takes writes. Every step may be repeated.
const {MONGO_INITDB_ROOT_USERNAME, MONGO_INITDB_ROOT_PASSWORD, IDEM_DATABASE, IDEM_PASSWORD} = process.env;
const host = process.env.IDEM_MONGO_HOST || "mongo:27017";

let isReady = false;
try {
  const admin = connect("mongodb://127.0.0.1:27017/admin?directConnection=true&serverSelectionTimeoutMS=3000");
  admin.auth(MONGO_INITDB_ROOT_USERNAME, MONGO_INITDB_ROOT_PASSWORD);
  if (!admin.hello().setName) {
    admin.runCommand({replSetInitiate: {_id: "rs0", members: [{_id: 0, host}]}});
  }
  const isPrimary = admin.hello().isWritablePrimary && Boolean(admin.hello().setName);
  if (isPrimary && !admin.getUser("idem")) {
    const roles = [{role: "dbOwner", db: IDEM_DATABASE}, {role: "clusterMonitor", db: "admin"}];
    admin.runCommand({createUser: "idem", pwd: IDEM_PASSWORD, roles, writeConcern: {w: "majority"}});
  }
  isReady = isPrimary;
} catch (problem) {
  print(problem.message);
}
quit(isReady ? 0 : 1);
